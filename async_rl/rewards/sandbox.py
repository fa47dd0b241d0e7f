"""Runs a program of the model where it can reach nothing: the outside of `inside/`.

    bwrap      namespaces of its own for users, mounts, processes, network, IPC and host name; no capability; nothing of
               the file system but /usr and a Python, read-only, and 16 MiB of /tmp; a clean environment; gone with us
    seccomp    no ptrace, mount, namespace, module, keyring, io_uring, ... (seccomp.py)
    cgroup     memory and processes of everything in there together, where the machine lets us (cgroups.py)
    rlimits    CPU, files, processes, and memory of each process where there is no cgroup
    uid        of nobody else, where we are root; root in the sandbox is nobody's in any case

What is missing is an error with a name, never a weaker sandbox: only the cgroup may be absent.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from async_rl.config import Rewards
from async_rl.errors import UserError
from async_rl.rewards import cgroups, seccomp
from async_rl.rewards.conversation import Conversation, Ended, SetupFailed
from async_rl.rewards.inside import MODULES
from async_rl.rewards.inside.channel import HEADER

SETUP_S = 30.0
"""From the start of the sandbox until the examiner in it says that it is ready: 40 ms."""
TMP, FILE = 16 << 20, 8 << 20
"""Bytes of /tmp, and of one file in it."""
OUTPUT = 1 << 20
"""Characters of standard output that are read."""
UIDS = range(61_000, 65_000)
"""Of nobody: above users', below the system's."""
INSTEAD = (
    "mend that, or, on a machine that has nothing to lose, set rewards.unsafe_code = true to run them as ordinary "
    "processes of this user"
)
INSIDE = "async_rl.rewards.inside"
COMPILE = """
import marshal, sys
files = {files!r}
sys.stdout.buffer.write(marshal.dumps([(name, compile(text, name, "exec")) for name, text in files]))
"""
BOOT = """
import marshal, os, sys, types
def read(size):
    parts = []
    while size:
        parts.append(os.read(0, size))
        size -= len(parts[-1]) or os._exit(1)
    return b"".join(parts)
for package in ("async_rl", "async_rl.rewards", "async_rl.rewards.inside"):
    sys.modules[package] = types.ModuleType(package)
for name, code in marshal.loads(read(int.from_bytes(read(4), "big"))):
    module = sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules["async_rl.rewards.inside"], name.rpartition(".")[2], module)
    exec(code, module.__dict__)
module.main()
"""


class Sandbox:
    """What a machine has to offer, looked at once.

    Raises:
        UserError: isolation is missing here, and `rewards.unsafe_code` is not set.
    """

    def __init__(self, settings: Rewards) -> None:
        self.contained = not settings.unsafe_code
        self._settings = settings
        self._bwrap, self._filter, self._options = "", b"", list[str]()
        if self.contained:
            self._bwrap = _bwrap()
            self._filter = seccomp.program(platform.machine())
            known = subprocess.run([self._bwrap, "--help"], capture_output=True, text=True).stdout
            self._options = ["--disable-userns"] if "--disable-userns" in known else []
        self.cgroup = self._cgroup() if self.contained else None
        try:
            self._python, self._examiner = self._find_python()
        except BaseException:
            self.close()
            raise

    def start(self, program: str, *, cpu_s: int, wall_s: float) -> Conversation:
        """The examiner with a program, ready to be asked.

        Raises:
            SetupFailed: it did not come up.
        """
        memory = None if self.cgroup is not None else self._settings.program_memory_mb << 20
        setup = {
            "program": program,
            "contained": self.contained,
            "cpu_s": cpu_s,
            "wall_s": wall_s,
            "output_bytes": OUTPUT,
            "file_bytes": FILE,
            "processes": self._processes(),
            "memory_bytes": memory,
        }
        talk = self._talk(self._python, BOOT)
        try:
            talk.write(HEADER.pack(len(self._examiner)) + self._examiner, SETUP_S)
            ready = talk.ask(setup, SETUP_S).get("ready")
        except Ended as ended:
            raise SetupFailed(f"{ended}: {talk.end() or 'it said nothing'}") from None
        except BaseException:
            talk.end()
            raise
        if self.contained and not _confined(ready):
            talk.end()
            raise SetupFailed(f"it is not confined: {ready}")
        return talk

    @property
    def description(self) -> str:
        if not self.contained:
            return f"{self._python} without isolation (rewards.unsafe_code)"
        limits = "limits of each process" if self.cgroup is None else f"control group version {self.cgroup.version}"
        return f"{self._python} in bubblewrap, under seccomp, with {limits}"

    def close(self) -> None:
        if self.cgroup is not None:
            self.cgroup.remove()

    def _talk(self, python: str, code: str) -> Conversation:
        command = [python, "-I", "-S", "-B", "-c", code]
        if not self.contained:
            return Conversation.start(lambda _: command, environment=_environment())
        root = os.geteuid() == 0
        return Conversation.start(
            lambda held: [*self._bubblewrap(python, *held), "--", *command],
            environment={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            files=[self._filter],
            join=self.cgroup.join if self.cgroup is not None else None,
            uid=UIDS[os.getpid() % len(UIDS)] if root else None,
        )

    def _bubblewrap(self, python: str, sync: int, filter: int) -> list[str]:
        """sync, filter: descriptors that the child has."""
        binds = ["--ro-bind", "/usr", "/usr"]
        for name in ("/lib", "/lib32", "/lib64", "/bin"):
            if os.path.islink(name):
                binds += ["--symlink", os.readlink(name), name]
            elif os.path.isdir(name):
                binds += ["--ro-bind", name, name]
        for path in _outside_usr(python):
            binds += ["--ro-bind", path, path]
        return [
            *(self._bwrap, "--unshare-all", "--unshare-user", *self._options, "--die-with-parent", "--new-session"),
            *("--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"),
            *(part for name, value in _environment().items() for part in ("--setenv", name, value)),
            *(*binds, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc", "--dev", "/dev"),
            *("--size", str(TMP), "--tmpfs", "/tmp", "--size", str(TMP), "--tmpfs", "/dev/shm"),
            *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"),
            *("--sync-fd", str(sync), "--seccomp", str(filter)),
        ]

    def _find_python(self) -> tuple[str, bytes]:
        """The interpreter for programs, and the examiner compiled for it, inside."""
        here = os.path.realpath(sys.executable)
        files = [
            (f"{INSIDE}.{name}", (Path(__file__).parent / "inside" / f"{name}.py").read_text()) for name in MODULES
        ]
        reasons: list[str] = []
        for path in [self._settings.python] if self._settings.python else dict.fromkeys((here, "/usr/bin/python3")):
            python = os.path.realpath(path)
            try:
                talk = self._talk(python, COMPILE.format(files=files))
                code, compiled, said = talk.read_all(SETUP_S)
            except SetupFailed as error:
                code, compiled, said = 1, b"", str(error)
            if code == 0 and compiled:
                return python, compiled
            reasons.append(f"{path}: {said or f'exit code {code}'}")
        field = f"rewards.python = {self._settings.python!r}: " if self._settings.python else ""
        raise UserError(f"{field}programs of the model cannot run here ({'; '.join(reasons)}); {INSTEAD}")

    def _cgroup(self) -> cgroups.Cgroup | None:
        spare = 8  # bwrap and the examiner
        return cgroups.make(self._settings.program_memory_mb << 20, self._settings.program_processes + spare)

    def _processes(self) -> int | None:
        """RLIMIT_NPROC. With a cgroup a backstop: it also counts processes that have just ended. Kernels before 5.14
        count all of the user's, wherever they are."""
        if self.cgroup is not None:
            return 128 + self._settings.program_processes
        others = 0 if os.geteuid() == 0 else _tasks_of(os.geteuid())
        return others + self._settings.program_processes + 8


def check(settings: Rewards) -> str:
    """What programs of the model run in here. Raises UserError where they cannot run, or not isolated."""
    found = Sandbox(settings)
    found.close()
    return found.description


def _bwrap() -> str:
    if sys.platform != "linux" or not seccomp.supported():
        raise UserError(
            f"programs of the model cannot be isolated on {platform.system()} {platform.machine()}; {INSTEAD}"
        )
    found = shutil.which("bwrap", path="/usr/bin:/usr/local/bin:/bin:" + os.environ.get("PATH", ""))
    if found is None:
        raise UserError(
            "programs of the model cannot be isolated here: bubblewrap is not installed (apt-get install bubblewrap); "
            f"{INSTEAD}"
        )
    return found


def _confined(status: object) -> bool:
    """By what the kernel says of the examiner."""
    said = cast("Mapping[str, str]", status) if isinstance(status, dict) else {}
    capabilities = {said.get(name) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    return said.get("Seccomp") == "2" and said.get("NoNewPrivs") == "1" and capabilities == {"0" * 16}


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


def _outside_usr(python: str) -> list[str]:
    """Where the interpreter and its library are, if that is not in /usr."""
    found = Path(python).parent.parent
    return [] if found.is_relative_to("/usr") or found == Path("/") else [str(found)]


def _tasks_of(uid: int) -> int:
    """Processes and threads of a user."""
    count = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                count += len(os.listdir(process / "task")) if process.stat().st_uid == uid else 0
            except OSError:  # it has just ended
                continue
    return count
