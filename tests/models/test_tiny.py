from __future__ import annotations

from pathlib import Path

import pytest
import torch

from async_rl.config import Model, TinyModel
from async_rl.errors import UserError
from async_rl.models.loading import build_model, load_config, load_stop_tokens, load_tokenizer
from async_rl.models.text import decode, encode, encode_chat

TINY = TinyModel(characters="0123456789= \n", hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48)
MODEL = Model(tiny=TINY)
CHAT = [{"role": "system", "content": "31"}, {"role": "user", "content": "02="}]


def saved(directory: Path) -> Model:
    build_model(MODEL, seed=3).save_pretrained(directory)
    load_tokenizer(MODEL).save_pretrained(directory)
    return Model(path=str(directory))


def test_one_token_per_character_and_nothing_else() -> None:
    tokenizer = load_tokenizer(MODEL)
    assert load_config(MODEL).vocab_size == len(tokenizer) == 3 + len(TINY.characters)
    assert encode(tokenizer, "90= \n") == [12, 3, 13, 14, 15]
    assert encode_chat(tokenizer, CHAT) == [tokenizer.bos_token_id, *encode(tokenizer, "3102=")]
    assert decode(tokenizer, [1, 6, 4, 3, 14, 5, 2]) == "310 2"
    assert load_stop_tokens(MODEL) == {tokenizer.eos_token_id}


def test_unknown_characters_are_named() -> None:
    tokenizer = load_tokenizer(MODEL)
    with pytest.raises(UserError, match=r"character 'x' in '31x2' is not in the vocabulary.*model\.tiny\.characters"):
        encode(tokenizer, "31x2")
    with pytest.raises(UserError, match=r"character '\+' in"):
        encode_chat(tokenizer, [{"role": "user", "content": "1+1"}])


def test_survives_a_round_trip_through_a_directory(tmp_path: Path) -> None:
    model = saved(tmp_path)
    tokenizer = load_tokenizer(model)
    assert encode_chat(tokenizer, CHAT) == encode_chat(load_tokenizer(MODEL), CHAT)
    assert decode(tokenizer, [1, 6, 4, 3, 14, 5, 2]) == "310 2"
    assert load_stop_tokens(model) == load_stop_tokens(MODEL)
    with pytest.raises(UserError, match="character 'x'"):
        encode(tokenizer, "x")
    original = dict(build_model(MODEL, seed=3).named_parameters())
    loaded = dict(build_model(model, seed=4).named_parameters())
    assert original.keys() == loaded.keys()
    assert all(torch.equal(original[name], loaded[name]) for name in original)


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_model(MODEL, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = build_model(MODEL, seed=5), build_model(MODEL, seed=6)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert build_model(MODEL, seed=5, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"characters": "011"}, r"characters = '011': write '1' only once"),
        ({"characters": ""}, r"characters = '': write the characters of the task"),
        ({"layers": 0}, r"layers = 0: write a number above 0"),
        ({"hidden_size": 36}, r"hidden_size = 36: write a multiple of 2 \* heads = 8"),
        ({"kv_heads": 3}, r"kv_heads = 3: write a divisor of heads = 4"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    model = Model(tiny=TinyModel(**{"characters": "01", "heads": 4, "hidden_size": 32, **changes}))
    with pytest.raises(UserError, match=rf"model\.tiny\.{message}"):
        load_config(model)
