"""One run, one folder: who owns it, and whether the owner still lives.

The lock is a file made by a hard link, which is atomic on NFS too. Its owner touches it every few seconds.
Nobody compares clocks: who finds the lock of another machine or container watches for a while whether it is
touched. An owner that finds its folder taken over, because it was stopped for long, ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from surgvqa.endings import ENDED, leave_code
from surgvqa.recipe import BadInput

log = logging.getLogger("surgvqa")

NAME, METRICS = ".lock", "metrics.jsonl"
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
            "place": _place(),
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
        own = self.file.with_name(f"{NAME}.{uuid.uuid4().hex}")
        try:
            with own.open("x", encoding="utf-8") as file:  # a new file: a link of that name is not followed
                file.write(json.dumps(self.owner))
            with contextlib.suppress(FileExistsError):  # which NFS may also say of a link that it has made
                os.link(own, self.file)
        finally:
            own.unlink(missing_ok=True)
        return _read(self.file) == self.owner

    def _remove(self, stale: dict[str, Any] | None) -> None:
        """Clear a stale lock away, unless another process was faster and has it now."""
        with contextlib.suppress(FileNotFoundError), self.file.open("r+", encoding="utf-8") as stream:
            with contextlib.suppress(OSError):  # not everywhere; then it shows at the next touch
                fcntl.flock(stream, fcntl.LOCK_EX)
            if _parsed(stream) == stale and os.path.samestat(os.fstat(stream.fileno()), self.file.stat()):
                self.file.unlink()

    def _touch(self) -> None:
        while not self._ended.wait(TOUCHED_EVERY):
            with contextlib.suppress(OSError):  # the disk's trouble shows where something is written
                found = _read(self.file)
                if found == self.owner:
                    os.utime(self.file)
                elif found is not None:
                    log.error(
                        "%s is held by process %s on %s: it took the folder over. This run ends without "
                        "writing any more",
                        *(self.file, found.get("pid"), found.get("host")),
                    )
                    os._exit(leave_code(BadInput.exit_code))
                elif self._taken():
                    log.warning("warning: %s was removed by somebody; this run took it again", self.file)


def is_run(folder: Path) -> bool:
    """Whether a run was here: it leaves how it ended or, where the disk was full, its metrics."""
    try:
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except OSError:  # no permission: whoever writes there is told
        return False
    return any(name in (ENDED, METRICS) or name.startswith(NAME) for name in names)


def owner(folder: Path) -> dict[str, Any] | None:
    """Who holds a folder, with `alive`: whether it seems so at a glance, which is for display."""
    file = folder / NAME
    found = _read(file)
    if found is None:
        return None
    try:
        if _here(found):
            alive = _alive(file, found)
        else:
            alive = abs(time.time() - file.stat().st_mtime) < 2 * WATCHED_FOR  # clocks are set back, too
    except (OSError, ValueError, TypeError):
        alive = False
    return {**found, "alive": alive}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        if not file.is_file():  # reading a pipe would wait for ever
            return None
        with file.open(encoding="utf-8") as stream:
            return _parsed(stream)
    except OSError:
        return None


def _parsed(stream: TextIO) -> dict[str, Any] | None:
    try:
        content = json.load(stream)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _alive(file: Path, owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock still lives; takes a while where its process cannot be seen from here."""
    if _here(owner):
        return _started(owner.get("pid", 0)) == owner.get("started") is not None
    if owner.get("host") is None:
        return False
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


def _here(owner: dict[str, Any]) -> bool:
    """Whether the owner's process number means the same process here. Its host's name does not tell:
    containers and machines may share it."""
    return owner.get("place") is not None and owner["place"] == _place()


def _place() -> str | None:
    """This boot of this machine, and in it this container; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: object) -> str | None:
    """When a process of this place began, in clock ticks since the boot (proc(5), field 22); None without it.

    A number that is given to another process later does not begin at the same tick.
    """
    if type(pid) is not int:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
