"""One run, one folder: who owns it, and whether the owner still lives.

The lock is a file made by a hard link, which is atomic on NFS too. Its owner touches it every few seconds.
Nobody compares clocks: who finds the lock of another machine watches for a while whether it is touched.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from surgvqa.recipe import BadInput

NAME = ".lock"
TOUCHED_EVERY = 10.0
"""Seconds between two signs of life."""
WATCHED_FOR = 35.0
"""Seconds after which a lock without one is stale; NFS may show it with some delay."""


class Lock:
    """Held from `Lock(folder)` until `release`. Raises BadInput naming the owner where there is another.

    A lock whose owner died is taken over.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        while not self._taken():
            other = _read(self.file)
            if other is not None and _alive(self.file, other):
                job = f", job {other['job']}" if other.get("job") else ""
                who = f"process {other.get('pid')} on {other.get('host')}{job}, since {other.get('since')}"
                raise BadInput(
                    f"output: {folder} belongs to a run that is going on: {who}. Choose another output, or "
                    "end that run"
                )
            self._remove(other)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others have the folder."""
        self._ended.set()
        self._thread.join()
        if _read(self.file) == self.owner:
            self.file.unlink(missing_ok=True)

    def _taken(self) -> bool:
        """Whether this process could make the lock its own."""
        own = self.file.with_name(f"{NAME}.{self.owner['host']}.{os.getpid()}")
        own.write_text(json.dumps(self.owner), encoding="utf-8")
        try:
            os.link(own, self.file)
        except FileExistsError:
            return False
        finally:
            own.unlink()
        return True

    def _remove(self, stale: dict[str, Any] | None) -> None:
        """Clear a stale lock away, unless another process was faster and has it now."""
        aside = self.file.with_name(f"{NAME}.stale.{self.owner['host']}.{os.getpid()}")
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != stale and not self.file.exists():
            aside.rename(self.file)
        else:
            aside.unlink()

    def _touch(self) -> None:
        while not self._ended.wait(TOUCHED_EVERY):
            try:
                os.utime(self.file)
            except OSError:
                continue  # the disk's trouble shows where something is written


def owner(folder: Path) -> dict[str, Any] | None:
    """Who holds a folder, with `alive`: whether it seems so at a glance, which is for display."""
    file = folder / NAME
    found = _read(file)
    if found is None:
        return None
    try:
        if found.get("host") == socket.gethostname():
            alive = _alive(file, found)
        else:
            alive = time.time() - file.stat().st_mtime < 2 * WATCHED_FOR
    except (OSError, ValueError, TypeError):
        alive = False
    return {**found, "alive": alive}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _alive(file: Path, owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock still lives; takes a while for one on another machine."""
    if owner.get("host") == socket.gethostname():
        return owner.get("started") is not None and _started(int(owner.get("pid", 0))) == owner["started"]
    before, until = _mark(file), time.monotonic() + WATCHED_FOR
    while time.monotonic() < until:
        time.sleep(1)
        if _mark(file) != before:
            return _mark(file) is not None
    return False


def _mark(file: Path) -> tuple[int, int] | None:
    try:
        with file.open("rb") as stream:  # opening it makes NFS look at the server's attributes
            status = os.fstat(stream.fileno())
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _started(pid: int) -> str | None:
    """When a process of this machine began: boot and clock ticks since (proc(5), field 22); None without it.

    A number that is given to another process later does not begin at the same tick.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{boot} {fields[19]}"
