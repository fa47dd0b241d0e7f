"""Whether every token was sampled by the weights its version names: the learner's model computes it again."""

from __future__ import annotations

import itertools

import numpy as np

from async_rl import config
from async_rl.ledger import records
from async_rl.ledger.store import snapshot
from async_rl.models.loading import build_model
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.wire.messages import RolloutResult

from ..engines.engine_cases import recompute

KEPT = ("checkpoint.every_steps=1", "checkpoint.keep=100000", "controller.keep_rollouts=all")
"""Overrides of a run that is looked at so: the weights of every version and every rollout stay."""


def check_logprobs(directory: RunDirectory, *, atol: float) -> dict[int, int]:
    """Of every rollout in the ledger. Tokens over keys and values of older weights (`kv_version`) are left out: no
    model computes these in one pass. Returns version -> tokens that were compared."""
    run = directory.load_config()
    sequences = []
    with snapshot(directory.ledger) as store:
        for key, value in store.scan(b"payload/"):
            for result in records.decode(key, value, list[RolloutResult]):
                sequences += [(sequence, span) for sequence in result.sequences for span in sequence.spans]
    checked: dict[int, int] = {}
    sequences.sort(key=lambda pair: pair[1].version)
    for version, parts in itertools.groupby(sequences, key=lambda pair: pair[1].version):
        path = directory.checkpoints / f"v{version:08d}"
        if version and not path.is_dir():
            continue
        source = config.Model(path=str(path)) if version else run.model
        model = build_model(source, seed=run.seed).eval()
        for sequence, span in parts:
            if span.kv_version != version:
                continue
            tokens = np.frombuffer(sequence.tokens, "<i4").tolist()
            expected = recompute(model, tokens[: span.start], tokens[span.start : span.end]).numpy()
            found = np.frombuffer(sequence.logprobs, "<f4")[span.start : span.end]
            np.testing.assert_allclose(found, expected, atol=atol, err_msg=f"version {version}")
            checked[version] = checked.get(version, 0) + span.end - span.start
    return checked
