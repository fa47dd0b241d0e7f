"""Pure: what training a sequence costs, from the shape of the model."""

from __future__ import annotations

from transformers import PreTrainedConfig


def attention_share(config: PreTrainedConfig, parameters: int) -> float:
    """What a token pays for each token of its sequence, relative to all it pays without attention: L tokens of one
    sequence cost L + attention_share * L^2, in units of a token.

    Causal attention: 2 matmuls of 2 FLOPs over L / 2 tokens on average, three times that with the backward pass: 6 *
    layers * heads * head_dim * L. Everything else: 6 per parameter (Kaplan et al. 2020, arXiv 2001.08361, 2.1), without
    the rows of the embedding, which are looked up; those of the output head, tied or not, are multiplied.

    parameters: of the whole model, a tied embedding counted once.
    """
    heads: int = config.num_attention_heads
    width = config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return width / (parameters - looked_up)
