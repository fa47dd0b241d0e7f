"""A Llama of a few layers with one token per character: small enough to learn from random weights in a minute."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from async_rl.config import TinyModel
from async_rl.errors import UserError
from async_rl.models.vocabulary import BOS, EOS, PAD, SPECIAL, tiny_tokens

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""bos, then the contents of the messages with nothing in between: roles leave no trace."""


def tiny_config(tiny: TinyModel) -> LlamaConfig:
    """The architecture. Raises UserError where the sizes do not fit together."""
    check_tiny(tiny)
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(tiny.characters),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.kv_heads,
        max_position_embeddings=tiny.max_length,
        tie_word_embeddings=False,  # tied ones of so few dimensions learn at half the speed
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )


def tiny_tokenizer(tiny: TinyModel) -> PreTrainedTokenizerFast:
    """One token per character; decoding joins them without spaces. Text outside the vocabulary raises when encoded:
    `models.text.encode` says which character it was."""
    check_tiny(tiny)
    vocabulary = {token: index for index, token in enumerate(tiny_tokens(tiny))}
    backend = Tokenizer(
        models.WordLevel(vocabulary, unk_token="")
    )  # no unknown token: an unknown character is an error
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=tiny.max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def check_tiny(tiny: TinyModel) -> None:
    """Raises UserError naming the field, the value and what to write instead."""
    repeated = sorted({character for character in tiny.characters if tiny.characters.count(character) > 1})
    if repeated:
        raise UserError(f"model.tiny.characters = {tiny.characters!r}: write {repeated[0]!r} only once")
    if not tiny.characters:
        raise UserError("model.tiny.characters = '': write the characters of the task, such as '0123456789='")
    for field in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "max_length"):
        if getattr(tiny, field) < 1:
            raise UserError(f"model.tiny.{field} = {getattr(tiny, field)}: write a number above 0")
    if tiny.hidden_size % (2 * tiny.heads):
        raise UserError(
            f"model.tiny.hidden_size = {tiny.hidden_size}: write a multiple of 2 * heads = {2 * tiny.heads}"
        )
    if tiny.heads % tiny.kv_heads:
        raise UserError(f"model.tiny.kv_heads = {tiny.kv_heads}: write a divisor of heads = {tiny.heads}")
