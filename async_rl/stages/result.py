"""What a stage leaves: a Hugging Face directory that is complete or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from async_rl.learner import checkpoint


def write_model(final: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """`model.path` of another recipe takes it. One that is there is replaced."""
    partial = final.with_name(f"{checkpoint.PARTIAL}{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with checkpoint.no_progress_bars():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    checkpoint.publish(partial, final)
