"""A real Slurm on this machine, in one directory: munged, slurmctld, a slurmd per node; no systemd, no cgroups."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
T = TypeVar("T")
GPUS = 4
LOOK_S = 0.1
"""Slurm tells nobody when a job changes: we look."""

CONF = """
ClusterName=asyncrl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MinJobAge=300
SlurmctldTimeout=10
SlurmdTimeout=5
PropagateResourceLimits=NONE
GresTypes=gpu
UnkillableStepTimeout=20
MessageTimeout=5
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 Boards=1 SocketsPerBoard=1 \
CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO DefMemPerCPU=200
"""


def missing() -> str:
    """Why there can be no cluster here; empty: there can."""
    if os.geteuid() != 0:
        return "not root"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    return f"no {', '.join(lacking)}: apt-get install slurm-wlm slurmctld slurmd munge" if lacking else ""


class SlurmCluster:
    """`start()`, then commands with `environment`; `stop()` ends the daemons it started and all jobs."""

    def __init__(self, root: Path, nodes: int = 3) -> None:
        self.root, self.nodes = root, nodes
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        for part in ("munge", "state", *(f"spool/n{index}" for index in self._indices())):
            (self.root / part).mkdir(parents=True)
        os.chmod(self.root, 0o755)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = self.root / "munge"
        self._do("munged", f"--socket={munge}/socket", f"--key-file={key}", f"--pid-file={munge}/pid",
                 f"--seed-file={munge}/seed", f"--log-file={munge}/log", "--num-threads=2")  # fmt: skip
        self._write_conf()
        self._do("slurmctld", "-c", "-f", self.root / "slurm.conf")
        for index in self._indices():
            self.start_node(f"n{index}")
        for index in self._indices():
            self.wait_node(f"n{index}", "idle")

    def start_node(self, name: str) -> None:
        self._do("slurmd", "-N", name, "-f", self.root / "slurm.conf")

    def kill_node(self, name: str) -> None:
        """As if its power was cut: slurmd, its step daemons, and whatever runs below them."""
        slurmd = psutil.Process(int((self.root / f"slurmd.{name}.pid").read_text()))
        for process in [slurmd, *self._of_node(name)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def sbatch(self, *arguments: object) -> str:
        """Returns the job's id."""
        return self._do("sbatch", "--parsable", *arguments).strip()

    def state(self, job: str) -> str:
        """Such as RUNNING; empty: Slurm has forgotten it."""
        shown = subprocess.run(
            ["scontrol", "-o", "show", "job", job], env=self.environment, capture_output=True, text=True
        ).stdout
        return shown.partition("JobState=")[2].partition(" ")[0]

    def wait_state(self, job: str, *states: str, within: float = 90) -> str:
        return self._wait(lambda: self.state(job), set(states), f"job {job}", within)

    def wait_node(self, name: str, *states: str, within: float = 60) -> str:
        def now() -> str:
            return self._do("sinfo", "-h", "-N", "-n", name, "-o", "%t").strip()

        return self._wait(now, set(states), f"node {name}", within)

    def begin_now(self, job: str) -> None:
        """A requeued job, which is held back for two minutes. Its former copy has to be gone first: the exit code of
        its script would be taken for that of the next one."""
        self._wait(lambda: self._step_daemons(job), {0}, f"the number of step daemons of job {job}", 60)
        self._wait(
            lambda: self._do("squeue", "-h", "-j", job, "-t", "COMPLETING", "-o", "%T").strip(), {""}, f"job {job}", 60
        )
        self._do("scontrol", "update", f"jobid={job}", "starttime=now")

    def _step_daemons(self, job: str) -> int:
        """They tell Slurm how their step ended before they are gone."""
        found = [process.info for process in psutil.process_iter(["name", "cmdline"])]
        return sum(one["name"] == "slurmstepd" and f"[{job}." in " ".join(one["cmdline"] or []) for one in found)

    def scancel(self, *arguments: object) -> None:
        self._do("scancel", *arguments)

    def stop(self) -> None:
        subprocess.run(["scancel", "-u", "root"], env=self.environment, capture_output=True)
        pids = [*self.root.glob("slurmd.*.pid"), self.root / "slurmctld.pid", self.root / "munge" / "pid"]
        ending = [process for index in self._indices() for process in self._of_node(f"n{index}")]
        for path in pids:
            with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
                process = psutil.Process(int(path.read_text()))
                if str(self.root) in " ".join(process.cmdline()):  # the very daemon that was started here
                    ending.append(process)
        for process in ending:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(ending, timeout=10)

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in self.root.glob("*.log"))

    def _indices(self) -> range:
        return range(1, self.nodes + 1)

    def _of_node(self, name: str) -> list[psutil.Process]:
        """Step daemons first, then what runs below them."""
        daemons: set[psutil.Process] = set()
        tasks: list[psutil.Process] = []
        ours = {"SLURMD_NODENAME": name, "SLURM_CONF": self.environment["SLURM_CONF"]}.items()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if ours <= process.environ().items():
                    tasks.append(process)
                    parent = process.parent()
                    daemons |= {parent} if parent is not None and parent.name() == "slurmstepd" else set()
        return [*daemons, *tasks]

    def _write_conf(self) -> None:
        with contextlib.ExitStack() as held:
            ports = [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]]
            first = _range(self.nodes)
        text = CONF.format(
            host=socket.gethostname().partition(".")[0],
            root=self.root,
            port=ports[0],
            nodes=self.nodes,
            first=first,
            last=first + self.nodes - 1,
            gpus=GPUS,
        )
        (self.root / "slurm.conf").write_text(text)
        devices = self.root / "gpus"
        devices.mkdir()
        for index in range(GPUS):  # twins of /dev/null: Slurm only wants them to be there
            os.mknod(devices / f"nvidia{index}", 0o020666, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(f"Name=gpu File={devices}/nvidia[0-{GPUS - 1}]\n")

    def _do(self, *command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def _wait(self, now: Callable[[], T], wanted: set[T], what: str, within: float) -> T:
        deadline = time.monotonic() + within
        while (found := now()) not in wanted:
            assert time.monotonic() < deadline, f"{what} is {found}, not {wanted}, after {within:.0f} s\n{self.logs()}"
            time.sleep(LOOK_S)
        return found


def _range(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with contextlib.suppress(OSError):
                for port in range(first + 1, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
                return first
