"""What a stage leaves: a Hugging Face directory that is complete or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from async_rl.learner import checkpoint
from async_rl.learner.distributed import Ranks
from async_rl.learner.saved_parts import Part, copy_part, write_part


def write_model(final: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> None:
    """`model.path` of another recipe takes it. One that is there is replaced. Every rank calls it: parameters may be
    spread over them; the first one writes."""
    copied = copy_part(Part("", model), ranks)
    if ranks.rank > 0:
        return
    partial = final.with_name(f"{checkpoint.PARTIAL}{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    write_part(copied, partial)
    tokenizer.save_pretrained(partial)
    checkpoint.publish(partial, final)
