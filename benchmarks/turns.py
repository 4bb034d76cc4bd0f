"""Several ways to do the same work, measured in turn: each in a process of its own, one at a time.

A process for each way makes its peak memory its own; taking turns in one run lets a machine's other load
fall on all of them alike, so ratios are taken within each round.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.record import spread


@dataclass(frozen=True)
class Measured:
    """One way's work in one round."""

    questions: int
    seconds: float
    tokens: int
    """Positions that the language model computed, padding included."""
    padding: int
    losses: tuple[float, ...] = ()
    """Mean nats per supervised token of each optimizer step."""
    answers: tuple[tuple[int, ...], ...] = ()
    """Token ids generated for each question."""
    nats: tuple[float, ...] = ()
    """Log-probability of each label of each question."""
    peak_gib: float = 0.0
    """Of the whole process; on a GPU, of its tensors."""

    @property
    def speed(self) -> float:
        """Questions per second."""
        return self.questions / self.seconds


Setting = TypeVar("Setting")


def in_turn(
    ways: Mapping[str, Callable[[Setting], Measured]],
    setting: Setting,
    warm_up: Setting,
    rounds: int,
    *,
    apart: bool = True,
) -> dict[str, list[Measured]]:
    """Each way's measurement in each round, after one on `warm_up` that is not kept.

    Without `apart` all work in this process: quicker to start, but they share one peak memory.
    """
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            for name in ways
            if apart
        }

        def measure(name: str, what: Setting) -> Measured:
            return processes[name].submit(ways[name], what).result() if apart else ways[name](what)

        for name in ways:
            measure(name, warm_up)
        done = [{name: measure(name, setting) for name in ways} for _ in range(rounds)]
    return {name: [each[name] for each in done] for name in ways}


@contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """Seconds until the device has finished, appended at the end."""
    _wait(device)
    seconds: list[float] = []
    began = time.perf_counter()
    yield seconds
    _wait(device)
    seconds.append(time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """Most memory that this process has used so far, in GiB; on a GPU, that its tensors have used."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # Linux passes ru_maxrss on from the process that started this one
        (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
        return int(kib) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def rows(results: Mapping[str, Sequence[Measured]], first: str, **same: Any) -> list[dict[str, Any]]:
    """A table row for each way; the others' rows say how many times as fast `first` was, round by round."""
    return [
        {
            **same,
            "way": name,
            "questions_per_s": spread([each.speed for each in measured]),
            "tokens_per_s": spread([each.tokens / each.seconds for each in measured]),
            "tokens": measured[0].tokens,
            "real_tokens_share": 1 - measured[0].padding / measured[0].tokens,
            "peak_gib": max(each.peak_gib for each in measured),
            **({"losses": measured[0].losses} if measured[0].losses else {}),
            **(
                {
                    f"{first}_times_as_fast": spread(
                        [a.speed / b.speed for a, b in zip(results[first], measured, strict=True)]
                    )
                }
                if name != first
                else {}
            ),
        }
        for name, measured in results.items()
    ]


def line(row: Mapping[str, Any], first: str) -> str:
    """A row for the terminal."""
    speed, faster = row["questions_per_s"], row.get(f"{first}_times_as_fast")
    text = (
        f"{row['family']:9} {row['questions_per_image']:3} per image  {row['way']:10}"
        f"{speed['median']:8.2f} questions/s ({speed['min']:.2f}-{speed['max']:.2f})"
        f"{row['tokens_per_s']['median']:8,.0f} tokens/s, {row['real_tokens_share']:6.1%} real"
        f"{row['peak_gib']:7.2f} GiB"
    )
    if faster:
        text += f"  {first} {faster['median']:.2f}x ({faster['min']:.2f}-{faster['max']:.2f})"
    return text
