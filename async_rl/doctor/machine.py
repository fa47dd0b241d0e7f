"""What this machine is: software, cores, memory, disk, network. No torch at import: a broken one is a finding."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from async_rl.config import Controller, Rewards, Run
from async_rl.doctor.check import Check
from async_rl.errors import UserError
from async_rl.layout import GPUS, lay_out
from async_rl.listening import listen
from async_rl.rewards.programs import describe_sandbox
from async_rl.units import size

DISTRIBUTION = "async-rl"
MODULES = {"prometheus-client": "prometheus_client", "pyzmq": "zmq"}
"""Where the module is not named after its distribution."""
EXTRAS = {
    "gguf": "a model directory from a GGUF file",
    "math": "formulae in rewards.math, environment.name = 'math'",
    "reasoning-gym": "environment.name = 'reasoning_gym'",
    "report": "plots and report.html",
    "tensorboard": "report_to = ['tensorboard']",
    "trackio": "report_to = ['trackio']",
    "wandb": "report_to = ['wandb']",
}
REQUIREMENT = re.compile(r"([\w.-]+)[^;>]*(?:>=([\d.]+))?[^;]*(?:; extra == ['\"]([\w-]+)['\"])?")
SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
SLOW_SYNC_S = 0.02
SYNCS, SYNC_BYTES = 12, 4096
CLOCK_SKEW_S = 2.0
FEW_DESCRIPTORS = 1024
FULL = 0.8
"""Above this share of what is available, an estimate is no longer comfortable."""


def software() -> list[Check]:
    """Python, what async-rl requires, and its extras."""
    checks = [Check("python", "ok", f"{platform.python_version()} on {platform.machine()}")]
    try:
        requirements = [REQUIREMENT.match(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return [*checks, Check("packages", "FAIL", "async-rl is not installed: pip install -e .")]
    extras: dict[str, list[str]] = {}
    for found in requirements:
        if found is None:
            continue
        name, least, extra = found.groups()
        if extra is None:
            checks.append(_package(name, least or "0"))
        elif extra in EXTRAS:
            extras.setdefault(extra, []).append(name)
    return checks + [_extra(extra, names) for extra, names in sorted(extras.items())]


def cores(run: Run | None) -> Check:
    """Whether threads and processes fit the cores."""
    count = available_cores()
    processes = run.generator.count + run.learner.ranks if run else 2
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() else 1
    found = f"{count} cores, {processes} busy processes (generators and learner ranks)"
    if threads * processes > count and threads > 1:
        return Check("cores", "warn", f"{found}: OMP_NUM_THREADS = {threads} is too many; unset it")
    fitting = max(1, count // processes)
    advice = f"; OMP_NUM_THREADS={fitting} would use them all" if fitting > threads else ""
    told = f"OMP_NUM_THREADS = {threads}" if given.isdigit() else "one thread each unless OMP_NUM_THREADS is set"
    crowded = "; they take turns" if processes > count else ""
    return Check("cores", "ok", f"{found}, {told}{advice}{crowded}")


def programs(settings: Rewards) -> Check:
    """Whether programs of a model could be graded here; a recipe whose environment needs it says so on its own."""
    try:
        return Check("programs", "ok", f"programs of a model (rewards.code) run by {describe_sandbox(settings)}")
    except UserError as error:
        return Check("programs", "warn", str(error))


def gpus() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("gpu", "ok", "none: generators and learner run on the CPU")]
    checks: list[Check] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        checks.append(Check("gpu", "ok", f"cuda:{index} {name}, {size(free)} of {size(total)} free"))
    return checks


def places(run: Run, names: Sequence[str]) -> Check:
    """Which service has which GPU when all of them run on this machine. names: of the GPUs that are visible."""
    try:
        placed = lay_out(run, [names])
    except UserError as error:
        return Check("placement", "warn", f"on this machine alone it does not start: {error}")
    on = [f"{one.name} on {one.environment[GPUS]}" for one in placed if GPUS in one.environment]
    shared = "all on the one GPU" if names else "all on the CPU"
    return Check("placement", "ok", ", ".join(on) or shared)


def shared_memory(needed: int, place: Path = SHARED_MEMORY) -> Check:
    """Room for the weights on their way to the generators. needed: bytes, 0 = not known."""
    instead = "weights go through files in the run directory, which is slower"
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("shared memory", "warn", f"{place}: {error.strerror}; {instead}")
    if free < needed:
        return Check(
            "shared memory",
            "warn",
            f"{place} has {size(free)} free, weights take {size(needed)}: {instead}; in a container, "
            f"--shm-size={-(-needed // (1 << 30))}g",
        )
    wanted = f", weights take {size(needed)}" if needed else ""
    return Check("shared memory", "ok", f"{place} has {size(free)} free{wanted}")


def disk(run_directory: Path, checkpoints: int, ledger: int) -> Check:
    """Bytes of the checkpoints, and of the ledger at most."""
    place = existing(run_directory)
    free = shutil.disk_usage(place).free
    if not checkpoints:
        return Check("disk", "ok", f"{size(free)} free in {place}")
    found = f"{size(free)} free in {place}; checkpoints take {size(checkpoints)}, the ledger at most {size(ledger)}"
    if free < checkpoints:
        return Check("disk", "FAIL", f"{found}: choose another --run-dir, or a smaller checkpoint.keep")
    if free < checkpoints + ledger:
        return Check("disk", "warn", f"{found}: more checkpoints (checkpoint.every_steps) keep the ledger smaller")
    return Check("disk", "ok", found)


def memory(needed: int, available: int, device: str = "cpu") -> Check:
    """needed: bytes, 0 = not known."""
    name, what = ("memory", "of memory") if device == "cpu" else ("gpu memory", f"on {device}")
    if not needed:
        return Check(name, "ok", f"{size(available)} {what} available")
    found = f"the recipe takes about {size(needed)} {what}, {size(available)} are available"
    if needed > available:
        smaller = "a smaller learner.microbatch_tokens, generator.slots or rollout.max_new_tokens, or a smaller model"
        return Check(name, "FAIL", f"{found}: write {smaller}")
    if needed > FULL * available:
        return Check(name, "warn", f"{found}: that is close")
    return Check(name, "ok", found)


def descriptors() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FEW_DESCRIPTORS:
        return Check("descriptors", "warn", f"{soft} open files at most: ulimit -n {4 * FEW_DESCRIPTORS}")
    return Check("descriptors", "ok", f"{'any number of' if soft < 0 else soft} open files at most")


def ports(run: Run | None) -> list[Check]:
    """Whether we can listen at the addresses and ports the recipe names; without one, on loopback."""
    checks: list[Check] = []
    for at in _addresses(run):
        try:
            listen(at.host, at.port, field=at.field, owner=at.owner, port_field=at.port_field).close()
        except UserError as error:
            check = Check("ports", "FAIL", str(error))
        else:
            free = f"{at.port_field} = {at.port} is free on {at.host}"
            check = Check("ports", "ok", free if at.port else f"can listen on {at.host}")
        if check not in checks:
            checks.append(check)
    return checks


class _Address(NamedTuple):
    """Where a service of a recipe will listen."""

    owner: str
    """The service."""
    field: str
    """The recipe's name of the host."""
    host: str
    port_field: str = ""
    port: int = 0
    """0: any free one."""


def _addresses(run: Run | None) -> Iterator[_Address]:
    controller = run.controller if run else Controller()
    yield _Address("controller", "controller.host", controller.host)
    numbers = [("controller.port", controller.port), ("controller.port + 1", controller.port and controller.port + 1)]
    for name, port in [*numbers, ("controller.admin_port", controller.admin_port)]:
        if port:
            yield _Address("controller", "controller.host", controller.host, name, port)
    if run is not None and run.weights_transport != "shared_memory":
        relay = ("weights.relay_port", run.weights.relay_port)
        yield _Address("learner", "weights.host", run.weights_host, *relay)
    if run is not None and run.generator.engine == "sglang" and run.generator.sglang.load_by == "group":
        yield _Address("generator", "generator.sglang.host", run.generator.sglang.host)


def syncing(run_directory: Path) -> Check:
    """How long a commit of the ledger waits for the disk, and whether the disk's clock is ours."""
    place = existing(run_directory)
    times: list[float] = []
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            for _ in range(SYNCS):
                file.write(bytes(SYNC_BYTES))
                file.flush()
                started = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - started)
            skew = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as error:
        return Check("sync", "FAIL", f"{place}: cannot be written ({error.strerror}); choose another --run-dir")
    median = statistics.median(times)
    found = f"{median * 1e3:.2f} ms to sync a write in {place}, {max(times) * 1e3:.1f} ms at most"
    if abs(skew) > CLOCK_SKEW_S:
        return Check("sync", "warn", f"{found}; its clock is {skew:+.0f} s off this machine's")
    if median > SLOW_SYNC_S:
        return Check("sync", "warn", f"{found}: every result waits so long for the ledger; choose a local disk")
    return Check("sync", "ok", found)


def available_cores() -> int:
    """Those this process may use, also in a container."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def available_memory() -> int:
    """Bytes that can be taken without swapping, also in a container."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None, "/proc/meminfo says how much memory is available since Linux 3.14"
    available = int(found[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text())
        available = min(available, limit)
    return available


def existing(path: Path) -> Path:
    """The nearest directory that is there already."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _package(name: str, least: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "FAIL", f"not installed: pip install '{name}>={least}'")
    if _release(version) < _release(least):
        return Check(name, "FAIL", f"{version} is too old: pip install '{name}>={least}'")
    try:
        module = importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # whatever a broken installation raises
        return Check(name, "FAIL", f"{version} cannot be imported: {type(error).__name__}: {error}")
    if name == "pyzmq":
        version += f" with libzmq {module.zmq_version()}"
    if name == "torch":
        version += f", {module.get_num_threads()} threads here"
    return Check(name, "ok", version)


def _extra(extra: str, names: list[str]) -> Check:
    versions: list[str] = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            return Check(f"extra {extra}", "ok", f"not installed (pip install 'async-rl[{extra}]'): {EXTRAS[extra]}")
    return Check(f"extra {extra}", "ok", f"{', '.join(versions)}: {EXTRAS[extra]}")


def _release(version: str) -> tuple[int, ...]:
    """Of "2.13.0+cpu": 2, 13, 0."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
