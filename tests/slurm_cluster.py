"""A real SLURM cluster for tests: munged, slurmctld and one slurmd per node, all of them on this machine.

Each node has two CPUs and two `gpu` resources that are empty files: SLURM grants GPUs and CUDA finds none.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel"]

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=20
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
PartitionName=all Nodes={nodes} Default=YES
"""
_NODE = "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2\n"
_SPARE = "PartitionName=spare Nodes={node}\n"


def missing() -> str:
    """Why no cluster can run here; empty if one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd must be started by root"


@contextmanager
def cluster(nodes: int = 1) -> Iterator[Cluster]:
    """Start a cluster of `nodes` nodes, wait until it takes jobs, and end what was started on leaving.

    Beside them is one that only jobs with `--partition=spare` use, to be hurt.
    """
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path may have 107 characters
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        # The first one's must resolve.
        names = [host, *(f"{host}-{number}" for number in range(2, nodes + 1)), f"{host}-spare"]
        _configure(folder, host, names)
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

        def start(log: str, *command: str) -> None:
            with (folder / f"{log}.log").open("w") as file:
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
            stack.callback(_end, process)

        start("munged", "munged", "--foreground", "--num-threads=2", *_munge_files(folder))
        _wait(lambda: (folder / "munge.socket").exists(), "munged opens its socket", folder)
        start("slurmctld", "slurmctld", "-D")
        for name in names:
            start(f"slurmd-{name}", "slurmd", "-D", "-N", name)
        running = Cluster(folder, environment, spare=names[-1])
        _wait(
            lambda: running.ask("sinfo", "--noheader", "-N", "-o", "%t").split() == ["idle"] * len(names),
            "all nodes are idle",
            folder,
        )
        stack.callback(running.cancel_all)
        yield running


class Cluster:
    def __init__(self, folder: Path, environment: dict[str, str], spare: str) -> None:
        self._folder = folder
        self.environment = environment
        self.spare = spare

    def ask(self, *command: str) -> str:
        """What a SLURM command prints; empty while the controller does not answer."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        ).stdout

    def run(self, *arguments: str, cwd: Path, timeout: float = 300) -> str:
        """Submit a batch job, wait for its end and return its state, such as COMPLETED or FAILED."""
        return self.end(self.submit("sbatch", "--parsable", *arguments, cwd=cwd), timeout)

    def submit(self, *command: str, cwd: Path) -> str:
        """Run a command that submits something; returns what it prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def end(self, job: str, timeout: float = 300) -> str:
        """Wait until a job has ended for good, and return its state."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        _wait(lambda: self.fields(job)["JobState"] not in going, f"job {job} ends", self._folder, timeout)
        return self.fields(job)["JobState"]

    def cancel_all(self) -> None:
        """End every job, and with it the processes that would outlive slurmd."""
        self.ask("scancel", "--user=root")
        _wait(lambda: not self.ask("squeue", "--noheader"), "the cancelled jobs end", self._folder)

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState and Restarts."""
        said = dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", job).split())
        return {"JobState": "PENDING", **said}


def _configure(folder: Path, host: str, names: list[str]) -> None:
    controller, *ports = _free_ports(1 + len(names))
    conf = _CONF.format(host=host, controller=controller, folder=folder, nodes=",".join(names[:-1]))
    conf += _SPARE.format(node=names[-1])
    for name, port in zip(names, ports, strict=True):
        conf += _NODE.format(name=name, port=port)
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    for fake in ("gpu0", "gpu1"):
        (folder / fake).touch()
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)


def _munge_files(folder: Path) -> list[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    return [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(condition: Callable[[], bool], what: str, folder: Path, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            logs = "".join(
                f"\n== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log"))
            )
            raise TimeoutError(f"waited {timeout:g} s and still not: {what}{logs}")
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
