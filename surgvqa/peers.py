"""The processes of a run watch each other: a dead or stuck one ends the others, who say which it was.

Each process has a thread that tells the others every second, through a store of its own, that it lives and
which step it last finished. The thread of a stopped process stops too; that of a dead one is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, says its documentation

from surgvqa.endings import PEER_LOST, PeerLost, Stop, Stopped, leave_code

log = logging.getLogger("surgvqa")

EVERY = 1.0
"""Seconds between two signs of life."""
SUSPECT = 5.0
"""Seconds of silence that explain a failed exchange."""
HEARD_WITHIN = 2.0
"""Seconds that the main process waits until the others know of a stop; they read it from its store."""


class Peers:
    """The other processes, watched for as long as this is entered."""

    def __init__(
        self,
        accelerator: Accelerator,
        patience: float,
        record: Callable[[str], object] | None = None,
        stop: Stop | None = None,
    ) -> None:
        """`patience` is the number of seconds without a sign of life after which a process is lost. This one
        then ends with the exit code for that, whatever its main thread waits for, and one of those left calls
        `record` with the message. While the run starts, a stop of one process is passed on to the `stop` of
        all.
        """
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.patience, self.record, self.step, self.stop = patience, record, 0, stop
        self._ended = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread: threading.Thread | None = None
        if self.world == 1:
            return
        host = os.environ.get("MASTER_ADDR", "localhost")
        wait = timedelta(seconds=patience)
        port = [0]
        if accelerator.is_main_process:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            port = [self._store.port]
        broadcast_object_list(port)
        if not accelerator.is_main_process:
            self._store = TCPStore(host, port[0], is_master=False, wait_for_workers=False, timeout=wait)
        self._tell()
        accelerator.wait_for_everyone()
        self._seen = {rank: ("", time.monotonic()) for rank in range(self.world) if rank != self.rank}
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()
        if stop is not None:
            stop.spread = lambda reason: self._store.set("stop", reason)

    def done(self, step: int) -> None:
        """Tell that a step is finished."""
        self.step = step

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop watching. Raises PeerLost where an exchange failed because another process is silent."""
        if isinstance(error, RuntimeError):
            self._explain(error)
        if isinstance(error, Stopped) and self._thread is not None:
            self._part()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _explain(self, error: Exception) -> None:
        until = time.monotonic() + 2 * SUSPECT
        while self._thread is not None and time.monotonic() < until:
            if lost := self._silent(SUSPECT):
                self._leave(*lost)
                raise PeerLost(lost[1]) from error
            time.sleep(EVERY / 4)

    def _part(self) -> None:
        """Confirm that this process knows of the stop; on the main one wait until all have done so."""
        with contextlib.suppress(RuntimeError):  # the main process held the store
            self._store.set(f"stopped/{self.rank}", "")
            until = time.monotonic() + HEARD_WITHIN
            others = [f"stopped/{rank}" for rank in range(self.world)]
            while self.rank == 0 and time.monotonic() < until and not self._store.check(others):
                time.sleep(0.05)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            self._exchange()
            if self._silent(self.patience):
                # The main thread may find out by itself, and say so better. And where all were stopped and go
                # on, as after Ctrl-Z, the others' signs come a moment later.
                time.sleep(SUSPECT)
                self._exchange()
                if not self._ended.is_set() and (lost := self._silent(self.patience)):
                    log.error("%s", lost[1])
                    self._leave(*lost)
                    os._exit(PEER_LOST)

    def _leave(self, lost: int, message: str) -> None:
        """Write how the run ended: the main process does, or where it is the lost one the next."""
        if self.rank == (1 if lost == 0 else 0):
            if self.record is not None:
                self.record(message)
            leave_code(PEER_LOST, rank=self.rank)

    def _exchange(self) -> None:
        try:
            self._tell()
            self._listen()
            if self.stop is not None and self.stop.reason is None and self._store.check(["stop"]):
                self.stop.ask(self._store.get("stop").decode())
        except RuntimeError:  # the main process held the store
            if self.rank != 0:
                self._seen[0] = (self._seen[0][0], float("-inf"))

    def _tell(self) -> None:
        sign = f"{time.monotonic()} {self.step} {socket.gethostname()} {os.getpid()}"
        self._store.set(f"sign/{self.rank}", sign)

    def _listen(self) -> None:
        now = time.monotonic()
        for rank, (known, _) in list(self._seen.items()):
            sign = self._store.get(f"sign/{rank}").decode()
            if sign != known:
                self._seen[rank] = (sign, now)

    def _silent(self, seconds: float) -> tuple[int, str] | None:
        """The process that has been silent for longest, if for so long, and what to say of it."""
        if not self._seen:
            return None
        rank, (sign, heard) = min(self._seen.items(), key=lambda item: item[1][1])
        if time.monotonic() - heard < seconds:
            return None
        _, step, host, pid = sign.split() if sign else ("", "0", "an unknown machine", "?")
        since = f"; the last step it finished was {step}" if step != "0" else ""
        return rank, (
            f"process {rank} (pid {pid} on {host}) is gone or stuck{since}. What it said itself tells more. "
            "The same command goes on from what was saved last"
        )
