"""Ends this process in the middle of its work with files."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""What Python tells of before it does it; of "open" not for reading, but for fsync. What is written by other
means than Python's lies between two of them."""


def kill_before(moment: int | str, folder: Path) -> None:
    """SIGKILL before a call on files in `folder`: the one of this number, or the first that reads so.

    A call reads like `os.rename .tmp-step-000003 step-000003`. Calls count from 0, the `os.mkdir` that begins
    a checkpoint, to the end of that checkpoint.
    """
    count, saves = -1, set()

    def heard(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in CALLS or not isinstance(arguments[0], str | Path):
            return
        if event == "open" and arguments[1] in ("r", "rb"):
            return
        path = Path(arguments[0])
        if path.is_absolute() and folder not in (path, *path.parents):
            return
        names = [Path(str(name)).name for name in arguments[: 2 if event == "os.rename" else 1]]
        call = " ".join([event, *names])
        if call.startswith("os.mkdir .tmp-step-"):
            saves.add(call)
        count += len(saves) == 1
        reached = call.startswith(moment) if isinstance(moment, str) else count == moment
        if saves and reached:
            print("killed before", call, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)


def killed(moment: int | str, folder: Path, work: Callable[[], int | None]) -> bool:
    """Do some work in a process of its own that is killed at a moment; whether it came to that."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            kill_before(moment, folder)
            os._exit(int(work() or 0))
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the work ended with {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)
