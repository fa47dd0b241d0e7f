"""How weights lie on the wire: one rule for both ends, so that nothing but bytes has to travel."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from async_rl.config import Run
from async_rl.models.parameters import Layout


def wire_layout(run: Run, model: PreTrainedModel | PreTrainedConfig) -> Layout:
    """In the dtype the engines compute in: casting at the learner gives the same bits as casting at the engine."""
    return Layout.of(model, dtype=getattr(torch, run.generator.dtype))
