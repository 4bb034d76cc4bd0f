"""Many faults at random moments: `make test-faults`, or `python -m faults.many --tries 50` in `tests`.

A run is killed, stopped and started again, on one process and on two in turn, until it has ended; then its
loss curve is compared with that of a run that nothing happened to. With `--steps 2000 --apart 50` it is one
long run. The run that nothing happens to must not take more memory or open files in its last third than in
its first. Prints a table: faults, tries and survivals.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from trajectory.conftest import Runs

from faults.conftest import ONE, TWO, Hurt
from surgvqa import checkpoint

FAULTS: dict[str, tuple[Callable[[Hurt], list[int]], int]] = {
    "F1 SIGKILL all": (lambda run: list(run.processes()), signal.SIGKILL),
    "F13 SIGKILL one rank": (lambda run: run.ranks()[-1:] or [run.started[-1].pid], signal.SIGKILL),
    "F5 SIGTERM all": (lambda run: list(run.processes()), signal.SIGTERM),
    "F5 SIGTERM the launcher": (lambda run: [run.started[-1].pid], signal.SIGTERM),
    "F5 SIGUSR1 the launcher": (lambda run: [run.started[-1].pid], signal.SIGUSR1),
    "F5 SIGUSR1 one rank": (lambda run: run.ranks()[-1:] or [run.started[-1].pid], signal.SIGUSR1),
}
"""Who is hurt, and how."""


def hurt_once(
    run: Hurt, launcher: list[str], moments: random.Random, apart: float, words: list[str]
) -> str | None:
    """Start the run and hurt it some steps later; returns the fault, or None where the run ended before."""
    fault, (whom, number) = moments.choice(list(FAULTS.items()))
    before = run.steps()
    process = run.start(launcher, "train.peer_timeout=10", *words)
    end = time.monotonic() + 300
    until = before + 1 + moments.uniform(0, 2 * apart)
    while run.steps() < until and process.poll() is None:
        assert time.monotonic() < end, run.log
        time.sleep(0.05)
    time.sleep(moments.uniform(0, 0.3))
    if process.poll() is not None:
        assert process.returncode == 0, run.log
        return None
    for pid in whom(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    process.wait(120)
    end = time.monotonic() + 60
    while run.processes():
        assert time.monotonic() < end, f"{fault}: processes left behind\n{run.log}"
        time.sleep(0.1)
    newest, rejected = checkpoint.newest(run.folder / "checkpoints")
    assert newest is not None or run.steps() <= run.every, f"{fault}: no checkpoint is whole\n{rejected}"
    return fault


def undisturbed(run: Hurt, words: list[str]) -> list[tuple[int, int]]:
    """Run it to its end; returns its MiB of memory and its open files, seen often once it trains."""
    process, sizes = run.start(ONE, *words), []
    while process.poll() is None:
        if run.steps():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                sizes.append((pages * os.sysconf("SC_PAGE_SIZE") // 2**20, files))
        time.sleep(0.1)
    assert process.returncode == 0, run.log
    return sizes


def main() -> int:
    parser = argparse.ArgumentParser("faults.many", description=__doc__.partition(":")[0])
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--apart", type=float, default=4, help="steps between faults, about")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments, words = random.Random(given.seed), [f"train.max_steps={given.steps}"]
    how = {"pause": 0.15, "every": 3}
    if given.steps > 100:
        # A long run is long enough as it is. One and two processes round otherwise, which learning lets grow:
        # by step 2,000 beyond 1e-5 at the other runs' rate, to 1.4e-6 at this one.
        how = {"pause": 0.0, "every": 20}
        words.append("train.lr=1e-5")
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("SURGVQA_CACHE", f"{folder}/cache")
        runs = Runs(Path(folder))
        reference = Hurt(runs, "undisturbed", **how)
        sizes = undisturbed(reference, words)
        number = 0
        while tried.total() < given.tries:
            run, here = Hurt(runs, f"run{number}", **how), []
            number += 1
            while tried.total() < given.tries:
                launcher = (ONE, TWO)[len(here) % 2]
                fault = hurt_once(run, launcher, moments, given.apart, words)
                if fault is None:
                    break
                here.append(fault)
                tried[fault] += 1
                print(f"{fault} after step {run.steps()}", flush=True)
            try:
                run.finish(ONE, *words, seconds=600)
                run.assert_curve(reference.folder, rel=1e-5, steps=given.steps)
            except AssertionError:
                traceback.print_exc()
                print(
                    f"run {number}: {len(here)} faults, and it is not the undisturbed run's curve", flush=True
                )
                continue
            survived.update(here)
            print(f"run {number}: {len(here)} faults, the curve is that of the undisturbed run", flush=True)
    print(f"{'fault':28}{'tries':>8}{'survived':>10}")
    for fault in FAULTS:
        print(f"{fault:28}{tried[fault]:>8}{survived[fault]:>10}")
    print(f"{'all':28}{sum(tried.values()):>8}{sum(survived.values()):>10}")
    third, flat = len(sizes) // 3, True
    for what, values in zip(("MiB", "open files"), zip(*sizes, strict=True), strict=True):
        first, last = max(values[:third]), max(values[-third:])
        print(f"{what} of the undisturbed run: {first} in its first third, {last} in its last")
        flat = flat and last <= 1.05 * first + 1
    return 0 if flat and survived == tried else 1


if __name__ == "__main__":
    raise SystemExit(main())
