"""How a run ends: the exit codes, what asks it to stop, and what it leaves for others to read.

    0  done
    2  bad recipe, data or folder (BadInput)
    3  storage: a disk is full, or cannot be written
    4  preempted: asked to stop and saved; the same command goes on
    5  numeric: gradients stayed non-finite, or a model answers with NaN
    6  peer lost: another process of the run, a data worker included, died or is stuck

`accelerate launch` and `torchrun` end with 1 whatever the processes' own code was. So the main process also
writes its code to `ended.json` in the run's folder, and to the file that SURGVQA_EXIT_FILE names.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from surgvqa.demo import cache_root
from surgvqa.recipe import BadInput, explain
from surgvqa.terminal import forgiving_streams

log = logging.getLogger("surgvqa")

PREEMPTED, STORAGE, NUMERIC, PEER_LOST = 4, 3, 5, 6
NAMES = {
    0: "done", 1: "failed", 2: "bad input", STORAGE: "storage", PREEMPTED: "preempted",
    NUMERIC: "numeric", PEER_LOST: "peer lost",
}  # fmt: skip

ENDED = "ended.json"
"""In the run's folder: how its last start ended."""

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}


class Ending(Exception):
    """A run that cannot go on, or may not; the message says why and what to do."""

    exit_code = 1


class Preempted(Ending):
    exit_code = PREEMPTED


class NotBegun(Preempted):
    """Asked to stop before the first step."""


class StorageFailure(Ending):
    exit_code = STORAGE


class NumericFailure(Ending):
    exit_code = NUMERIC


class PeerLost(Ending):
    exit_code = PEER_LOST


class Stopped(BaseException):
    """Raised in the main thread by a signal that comes while a command starts: see `Stop`.

    Not an Exception, as KeyboardInterrupt is none: code that handles errors of data or models must not catch
    it.
    """

    exit_code = PREEMPTED


NOT_BEGUN = "stopped ({reason}) before the first step; nothing was lost: the same command starts again"


def is_storage(error: OSError) -> bool:
    """Whether it is the disk that failed, not the program."""
    return error.errno in _STORAGE_ERRORS


def of_os_error(error: OSError, place: Path | None = None) -> Ending | BadInput | None:
    """Return the error to show to a user for an error of the file system; None for any other OSError.

    The message names `place` if the error names no file, as when a write fails.
    """
    name = error.filename if isinstance(error.filename, (str, bytes, os.PathLike)) else None
    if is_storage(error):
        where = os.fsdecode(name or place or "a file")
        return StorageFailure(f"{where}: {error.strerror}; make room, and the same command goes on")
    if name is None or error.errno is None:
        return None
    cure = "give another path, or repair this one"
    if Path(os.fsdecode(name)).is_relative_to(cache_root()):
        cure = "this is the cache; set SURGVQA_CACHE to a folder that can be written"
    return BadInput(f"{os.fsdecode(name)}: {error.strerror}; {cure}")


@contextlib.contextmanager
def file_errors(place: Path | None = None) -> Iterator[None]:
    """Replace an OSError by the BadInput or StorageFailure that `of_os_error` makes of it, if any."""
    try:
        yield
    except OSError as error:
        raise of_os_error(error, place) or error from None


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Replace an OSError by BadInput, for a command that writes to the path given as --out."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"--out {out}: cannot be written: {error.strerror or error}; choose another one"
        ) from None


def run_command(work: Callable[[], int | None]) -> int:
    """Run a command and return its exit code. Print one line for each thing that a user must repair.

    An output that cannot be written does not end the command: see `forgiving_streams`. Ctrl-C ends it
    with 130, as shells count it, where nothing else handles it.
    """
    forgiving_streams()
    try:
        with file_errors():
            return work() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BadInput as error:
        return explain(error)
    except NotBegun as error:
        leave_now(_told(error))
    except Ending as error:
        return _told(error)


def _told(ending: Ending) -> int:
    log.error("%s", ending)
    return ending.exit_code


class Stop:
    """True once this process is asked to stop: by a signal, by the death of its launcher, by `max_hours`, or
    by the file that SURGVQA_STOP_FILE names, once it exists.

    A second signal ends the process at once. One that comes within SAME seconds counts as the first, since
    launchers pass a signal on to processes that have received it already. Under nohup SIGHUP is ignored.

    While a run starts (it reads data and loads a model), no code looks at the flag. So until `started` is
    called, and if `start` is given, a signal raises Stopped in the main thread. If that thread is in C code
    for more than GRACE seconds, such as waiting for another process, a second thread calls `last_words` and
    ends the process with code 4.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    SAME = 3.0
    GRACE = 3.0

    def __init__(self, max_hours: float | None = None, *, start: str = "") -> None:
        """`start` is the message of Stopped and may hold `{reason}`; without it Stopped is never raised."""
        self.start = start
        self.spread: Callable[[str], object] = _ignored
        """Called with the reason when this process is asked to stop during its start, to tell the others."""
        self.last_words: Callable[[str], object] = _ignored
        """Records the end of a process that its thread ends; gets the text to say."""
        self._raised = self._meeting = False
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread()
        self.reason: str | None = None
        self.since = 0.0
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        file = os.environ.get("SURGVQA_STOP_FILE")
        self.file = Path(file) if file else None

    def __enter__(self) -> Stop:
        self.before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._asked)
            for number in self.SIGNALS
            if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)
        }
        if _launched():
            _tell_of_parents_death()
        if self.start:
            self._woken, self._wakes = os.pipe()
            os.set_blocking(self._wakes, False)
            # Python calls handlers only between steps of Python code; the pipe wakes the thread at once.
            self._wakes_before = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.started()
        if isinstance(error, Stopped):
            self.obeyed()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def start_together(self, meet: Callable[[], object]) -> None:
        """Call `meet`, which waits for all processes, and then `started`.

        A process that is asked to stop while it waits goes on once all have come: the others, which start
        before they hear of it, would wait for it. Raises Stopped where one of them has left.
        """
        self._meeting = True
        try:
            meet()
            self.started()
        except RuntimeError:
            if self.reason is None:
                raise
            self._raised = True
            raise Stopped(self.start.format(reason=self.reason)) from None
        finally:
            self._meeting = False

    def started(self) -> None:
        """End the start: from here on a signal only sets the flag."""
        self.start = ""
        if self._thread is not None:
            signal.set_wakeup_fd(self._wakes_before)
            os.write(self._wakes, b"\0")
            self._thread.join()
            self._thread = None
            os.close(self._woken)
            os.close(self._wakes)

    def ask(self, reason: str) -> None:
        """Ask this process to stop, from any of its threads."""
        self._note(reason)
        if self.start and not self._raised and self._main.ident is not None:
            signal.pthread_kill(self._main.ident, signal.SIGUSR1)

    def _note(self, reason: str) -> bool:
        """Record why and when this process is asked to stop; return False if it was asked before."""
        if self.reason is not None:
            return False
        self.reason, self.since = reason, time.monotonic()
        return True

    def _watch(self) -> None:
        """Tell the other processes of a stop during the start, and end this one if it does not obey."""
        until = None
        while self.start:
            ready, _, _ = select.select([self._woken], [], [], 0.5)
            numbers = os.read(self._woken, 512) if ready else b""
            names = [signal.Signals(n).name for n in numbers if n in self.SIGNALS]
            if until is None and (names or self):
                until = time.monotonic() + self.GRACE
                reason = self.reason or names[0]
                self.ask(reason)
                with contextlib.suppress(Exception):  # the others may be gone
                    self.spread(reason)
            if until is not None and time.monotonic() > until and self.start:
                with contextlib.suppress(Exception):
                    self.last_words(self.start.format(reason=self.reason))
                os._exit(leave_code(PREEMPTED))

    def obeyed(self) -> None:
        """Ignore further signals until the process ends.

        Launchers send one to the processes that end last, which must still write their exit code.
        """
        for number in self.SIGNALS:
            self.before[number] = signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN)

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "train.max_hours is over"
        if self.reason is None and self.file is not None and os.access(self.file, os.F_OK):
            self.reason = f"asked by {self.file}, which the next start must not find"
        return self.reason is not None

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _print_nowhere()
        first = self._note(signal.Signals(number).name)
        if self.start:
            if not (self._raised or self._meeting):
                self._raised = True
                raise Stopped(self.start.format(reason=self.reason))
        elif first:
            if os.environ.get("RANK", "0") == "0":
                # Not `print`, which the signal may have come in the middle of.
                with contextlib.suppress(OSError):
                    os.write(2, f"{self.reason}: stopping and saving; the same again ends it now\n".encode())
        elif time.monotonic() - self.since > self.SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _ignored(text: str) -> None:
    """Do nothing: the default of `Stop.spread` and `Stop.last_words`."""


def ignore_signals(worker: int) -> None:
    """For data workers: they end with the process that they work for, after it has saved."""
    for number in Stop.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _print_nowhere() -> None:
    """Where the terminal is gone, printing would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        if stat.S_ISCHR(os.fstat(standard).st_mode) and not os.isatty(standard):
            os.dup2(nowhere, standard)
    os.close(nowhere)


def _launched() -> bool:
    """Whether a launcher, which should not be outlived, started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return False
    return b"accelerate" in parent and b"launch" in parent


def _tell_of_parents_death() -> None:
    """Have Linux send SIGTERM when the launcher dies, which would else leave this process behind."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def leave_now(code: int) -> NoReturn:
    """End the process without freeing its memory, which takes seconds with a million questions.

    Freeing a process group could also wait for processes that no longer exist.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(leave_code(code))


def leave_code(code: int, rank: int = 0) -> int:
    """Write an exit code where a batch script asked for it; returns it.

    It is the main process's, or that of another `rank` which speaks for one that cannot.
    """
    file = os.environ.get("SURGVQA_EXIT_FILE")
    if file and os.environ.get("RANK", "0") == str(rank):
        Path(file).write_text(f"{code}\n", encoding="ascii")
    return code
