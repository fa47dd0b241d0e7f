"""Recipes and batches the learner's tests share; importable by the processes they spawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from async_rl.config import Algorithm, Environment, Model, Optimizer, Run, TinyModel
from async_rl.config import Learner as LearnerConfig
from async_rl.config import Rollout as RolloutConfig
from async_rl.learner.scalar import PackedScalar
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.wire.messages import MicroBatches, Sequence, TrainRollout, VersionSpan

VOCABULARY = 14


def tiny_run(**sections: Any) -> Run:
    """Clipping off, so that `parameter.grad` after a step is the gradient of the loss. Nothing is computed beside."""
    run = Run(
        steps=10,
        model=Model(tiny=TinyModel(characters="0123456789=", hidden_size=32, heads=4, kv_heads=2)),
        environment=Environment(name="sorting"),
        rollout=RolloutConfig(groups_per_step=4, group_size=4, max_new_tokens=8),
        optimizer=Optimizer(learning_rate=1e-2, clip_norm=0.0),
        algorithm=Algorithm(options={"veto": None, "guard_low": 0.7}),
        learner=LearnerConfig(mismatch_steps=0),
    )
    return msgspec.structs.replace(run, **sections)


def save_model(directory: Path, seed: int) -> str:
    """The tiny model and its tokenizer from other random weights; returns the path, as a recipe writes it."""
    model = tiny_run().model
    build_model(model, seed=seed).save_pretrained(directory)
    load_tokenizer(model).save_pretrained(directory)
    return str(directory)


def save_scalar(directory: Path, seed: int, bias: float = 0.0) -> str:
    """The same with a scalar head, as a reward model."""
    model = tiny_run().model
    scalar = PackedScalar.load(model, seed=seed)
    scalar.bias = bias
    scalar.save(directory, load_tokenizer(model))
    return str(directory)


def ragged_rollouts(seed: int, version: int = 3, groups: int = 4, size: int = 4) -> list[TrainRollout]:
    """Ragged lengths; some rollouts with two sequences, some with a gap of tool tokens, tokens of several versions. The
    rollouts of even groups begin with one prompt, those of odd groups each with its own."""
    rng = np.random.default_rng(seed)
    rollouts: list[TrainRollout] = []
    for group in range(groups):
        shared = rng.integers(3, VOCABULARY, int(rng.integers(2, 6))) if group % 2 == 0 else None
        for member in range(size):
            sequences = [_sequence(rng, version, shared)]
            if (group + member) % 5 == 0:
                sequences.append(_sequence(rng, version))
            rollouts.append(TrainRollout(group, member, float(rng.integers(0, 5)) / 4, sequences))
    return rollouts


def _sequence(rng: np.random.Generator, version: int, shared: npt.NDArray[np.int64] | None = None) -> Sequence:
    prompt, first, gap, second = (int(rng.integers(low, high)) for low, high in ((2, 6), (1, 5), (0, 3), (1, 5)))
    prompt = prompt if shared is None else len(shared)
    length = prompt + first + gap + second + int(rng.integers(0, 2))
    tokens = rng.integers(3, VOCABULARY, length).astype("<i4")
    if shared is not None:
        tokens[:prompt] = shared
    logprobs = np.zeros(length, "<f4")
    older = max(version - int(rng.integers(0, 2)), 0)
    spans = [
        VersionSpan(prompt, prompt + first, older, older),
        VersionSpan(prompt + first + gap, prompt + first + gap + second, version, older),
    ]
    for span in spans:
        logprobs[span.start : span.end] = -np.log(VOCABULARY) + 0.3 * rng.normal(size=span.end - span.start)
    return Sequence(tokens.tobytes(), logprobs.tobytes(), spans)


def message(
    rollouts: list[TrainRollout], plan: list[list[list[int]]] | None = None, step: int = 0, version: int = 3
) -> MicroBatches:
    """One micro-batch on one rank unless a plan says otherwise. Versions are the batch's own, whatever the step."""
    return MicroBatches(step, version, rollouts, plan or [[list(range(len(rollouts)))]])
