"""proto/ says what the code does: schemas are current, golden frames decode, every message is in there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from async_rl.wire.codec import Codec

PROTO = Path(__file__).resolve().parents[2] / "proto"
STREAMS = ["generator_to_controller", "controller_to_generator", "learner_to_controller", "controller_to_learner"]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("proto_generate", PROTO / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["proto_generate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stream", STREAMS)
def test_schemas_are_current(generate: ModuleType, stream: str) -> None:
    assert (PROTO / "schema" / f"{stream}.json").read_text() == generate.schema(stream), "run proto/generate.py"


@pytest.mark.parametrize("stream", STREAMS)
def test_every_message_has_an_example(generate: ModuleType, stream: str) -> None:
    assert {type(one) for one in generate.EXAMPLES[stream]} == set(get_args(generate.STREAMS[stream]))


@pytest.mark.parametrize("stream", STREAMS)
def test_golden_frames_decode_to_the_examples(generate: ModuleType, stream: str) -> None:
    codec: Codec[object, object] = Codec(generate.STREAMS[stream], generate.STREAMS[stream])
    for example in generate.EXAMPLES[stream]:
        data = (PROTO / "golden" / "v0" / f"{stream}.{type(example).__name__}.msgpack").read_bytes()
        frame = codec.decode(data)
        assert frame.epoch == generate.EPOCH and frame.messages == [example], "run proto/generate.py"
