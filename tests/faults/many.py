"""Many faults at random moments: `make test-faults`, or `python -m faults.many --tries 50` in `tests`.

A run is killed, stopped and started again, on one process or two, until it has ended; then its loss curve is
compared with that of a run that nothing happened to. With `--steps 2000` it is one long run. Prints a table:
faults, tries and survivals, and how much memory and how many open files the processes had.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from trajectory.conftest import Runs

from faults.conftest import ONE, TWO, Hurt
from surgvqa import checkpoint

FAULTS: dict[str, tuple[Callable[[Hurt], list[int]], int]] = {
    "SIGKILL all": (lambda run: list(run.processes()), signal.SIGKILL),
    "SIGKILL one rank": (lambda run: run.ranks()[-1:] or [run.started[-1].pid], signal.SIGKILL),
    "SIGTERM all": (lambda run: list(run.processes()), signal.SIGTERM),
    "SIGTERM the launcher": (lambda run: [run.started[-1].pid], signal.SIGTERM),
    "SIGUSR1 the launcher": (lambda run: [run.started[-1].pid], signal.SIGUSR1),
    "SIGUSR1 one rank": (lambda run: run.ranks()[-1:] or [run.started[-1].pid], signal.SIGUSR1),
}
"""Who is hurt, and how."""


def hurt_once(run: Hurt, moments: random.Random, steps: int, sizes: list[tuple[int, int]]) -> str | None:
    """Start the run and hurt it at some moment; returns the fault, or None where the run ended before."""
    launcher, (fault, (whom, number)) = moments.choice([ONE, TWO]), moments.choice(list(FAULTS.items()))
    before = run.steps()
    process = run.start(launcher, "train.peer_timeout=10", f"train.max_steps={steps}")
    end = time.monotonic() + 300
    while run.steps() <= before and process.poll() is None:
        assert time.monotonic() < end, run.log
        time.sleep(0.05)
    time.sleep(moments.uniform(0, max(1.5, 0.01 * steps)))
    if process.poll() is not None:
        assert process.returncode == 0, run.log
        return None
    for pid in run.ranks() or [process.pid]:
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            sizes.append((pages * os.sysconf("SC_PAGE_SIZE") // 2**20, files))
    for pid in whom(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    process.wait(120)
    end = time.monotonic() + 60
    while run.processes():
        assert time.monotonic() < end, f"{fault}: processes left behind\n{run.log}"
        time.sleep(0.1)
    newest, rejected = checkpoint.newest(run.folder / "checkpoints")
    assert newest is not None or run.steps() < 3, f"{fault}: no checkpoint is whole\n{rejected}"
    return fault


def main() -> int:
    parser = argparse.ArgumentParser("faults.many", description=__doc__.partition(":")[0])
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments = random.Random(given.seed)
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("SURGVQA_CACHE", f"{folder}/cache")
        runs = Runs(Path(folder))
        reference = Hurt(runs, "undisturbed")
        reference.finish(ONE, f"train.max_steps={given.steps}")
        number = 0
        while sum(tried.values()) < given.tries:
            run, here = Hurt(runs, f"run{number}"), []
            number += 1
            while len(here) + sum(tried.values()) < given.tries:
                fault = hurt_once(run, moments, given.steps, sizes)
                if fault is None:
                    break
                here.append(fault)
                print(f"{fault} after step {run.steps()}", flush=True)
            run.finish(ONE, f"train.max_steps={given.steps}")
            run.assert_curve(reference.folder, rel=1e-5, steps=given.steps)
            tried.update(here)
            survived.update(here)
            print(f"run {number}: {len(here)} faults, the curve is that of the undisturbed run", flush=True)
    print(f"{'fault':24}{'tries':>8}{'survived':>10}")
    for fault in FAULTS:
        print(f"{fault:24}{tried[fault]:>8}{survived[fault]:>10}")
    print(f"{'all':24}{sum(tried.values()):>8}{sum(survived.values()):>10}")
    third = max(1, len(sizes) // 3)
    for what, values in zip(("MiB", "open files"), zip(*sizes, strict=True), strict=True):
        print(f"{what}: at most {max(values[:third])} in the first third, {max(values[-third:])} in the last")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
