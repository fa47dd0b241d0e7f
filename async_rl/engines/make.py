"""The engine a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from async_rl.config import Run
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Engine
from async_rl.engines.sglang.addresses import check_host
from async_rl.engines.sglang.engine import SGLangEngine
from async_rl.engines.sglang.installation import python_of
from async_rl.engines.sglang.keys import keys_of
from async_rl.engines.sglang.settings import InFlight, Settings
from async_rl.listening import listen
from async_rl.models.loading import SUPPORTED, load_tokenizer
from async_rl.models.parameters import Layout


def make_engine(run: Run, config: PreTrainedConfig, directory: Path, *, name: str, index: int = 0) -> Engine:
    """Not started. dtypes must be settled (models.precision).

    directory: for what a server prints (`<name>-sglang.log`) and for the files it reads (`<name>-sglang/`).
    index: which of the generators this is.

    Raises:
        UserError: the embedded engine does not run this architecture, or SGLang servers are not found or fed as the
            recipe says.
    """
    device = run.generator.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if run.generator.engine == "embedded":
        return EmbeddedEngine(
            config,
            slots=run.generator.slots,
            max_length=run.generator.max_length,
            dtype=getattr(torch, run.generator.dtype),
            device=device,
        )
    server = run.generator.sglang
    if server.load_by == "group":  # said before a server takes its time to start
        listen(server.host, field="generator.sglang.host", owner="generator").close()
        check_host(server.host, server.attach)
    files = directory / f"{name}-sglang"
    urls = [url.rstrip("/") for url in server.attach]
    attach = urls if server.router else urls[index :: run.generator.count]
    in_flight: InFlight = "recompute" if run.weights.in_flight == "auto" else run.weights.in_flight
    settings = Settings(
        command=() if attach else _command(run, config, files / "model", device),
        environment=server.environment,
        log=directory / f"{name}-sglang.log",
        scratch=files / "weights",
        attach=attach,
        router=server.router,
        keys=keys_of(server),
        in_flight=in_flight,
        load_by=server.load_by,
        backend=server.backend,
        host=server.host,
        timeout_s=run.weights.timeout_s,
        pause_s=server.pause_s,
        start_s=server.start_s,
        drain_s=run.environment.timeout_s,
        stuck_s=server.stuck_s,
        stream_tokens=server.stream_tokens,
        off_device=run.colocated,
        copy=run.weights.transport != "shared_memory",
    )
    limit: Any = getattr(config, "max_position_embeddings", 0)
    return SGLangEngine(
        settings,
        slots=run.generator.slots,
        vocabulary=int(config.vocab_size),
        context=int(limit),
        max_length=run.generator.max_length,
        shapes={entry.name: entry.shape for entry in Layout.of(config).entries},
    )


def _command(run: Run, config: PreTrainedConfig, files: Path, device: str) -> Sequence[str]:
    """How a server of this recipe is started. It has nothing to do with text, so it gets no tokenizer."""
    server = run.generator.sglang
    python = python_of(server)
    model = run.model.path
    if run.model.tiny is not None:  # the weights come from the learner: only the architecture is needed
        config.architectures = [SUPPORTED[config.model_type]]
        config.save_pretrained(files)
        load_tokenizer(run.model).save_pretrained(files)
        model = str(files)
    return [
        *(python, "-m", "sglang.launch_server", "--model-path", model),
        *("--host", "127.0.0.1", "--port", "{port}", "--dtype", run.generator.dtype, "--device", device.split(":")[0]),
        *("--max-running-requests", str(run.generator.slots), "--weight-version", "none"),
        *("--skip-tokenizer-init", "--incremental-streaming-output", "--sleep-on-idle", "--log-level-http", "warning"),
        *(("--load-format", "dummy") if run.model.tiny is not None else ()),
        *(("--enable-memory-saver",) if run.colocated and device.startswith("cuda") else ()),
        *server.arguments,
    ]
