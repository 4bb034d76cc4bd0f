"""What is printed: texts of data, model folders and runs are shown, and cannot steer the terminal.

Errors go through `recipe.explain`, log lines through `Formatter`, everything else through `Console`. Commands
first call `forgiving_streams`, after which printing never raises.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import rich.console
from rich.segment import Segment

from surgvqa.recipe import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

T = TypeVar("T")

LINE_EVERY = 10.0
"""Seconds between two lines about work that goes on, where there is no terminal to draw a bar on."""
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a stream whose reader or terminal has gone; no warning about them could be read."""


def forgiving_streams() -> None:
    """Replace sys.stdout and sys.stderr of this process by streams that never raise.

    After the first error (the reader has gone, the disk is full, the stream was closed) all output is
    dropped. A character that the encoding lacks is printed as a replacement. Streams that a test or a
    notebook has put in place stay.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is None:  # closed when Python started
            _occupy(descriptor)
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
            continue
        descriptor = stream.fileno()
        try:
            stream.flush()
        except OSError:
            _discard(descriptor)
        forgiving = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(descriptor, name)),
            encoding=stream.encoding,
            errors="replace" if name == "stdout" else "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, forgiving)


class _Forgiving(io.RawIOBase):
    """A file descriptor that becomes /dev/null at the first error."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.stream_name = descriptor, name

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        while True:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:  # the pipe was opened as non-blocking, and its reader is slow
                select.select([], [self.descriptor], [])
            except OSError as error:
                _discard(self.descriptor)
                if self.stream_name == "stdout" and error.errno not in _GONE:
                    print(f"warning: stdout: {error.strerror}; nothing more is printed", file=sys.stderr)


def _discard(descriptor: int) -> None:
    """Redirect a descriptor to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _occupy(descriptor: int) -> None:
    """Open /dev/null as a descriptor, if it is closed.

    Otherwise the next file to be opened, such as a checkpoint's, would get that number, and libraries that
    print to descriptor 1 or 2 would write into it.
    """
    with contextlib.suppress(OSError):
        os.fstat(descriptor)
        return
    null = os.open(os.devnull, os.O_WRONLY)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)


class Console(rich.console.Console):
    """rich's, except that control characters in a text are printed as escapes. Texts are no markup."""

    def __init__(self, *, quiet: bool = False, stderr: bool = False) -> None:
        super().__init__(quiet=quiet, stderr=stderr, markup=False, emoji=False)

    def render(
        self,
        renderable: rich.console.RenderableType,
        options: rich.console.ConsoleOptions | None = None,
    ) -> Iterable[Segment]:
        """Segments as rich makes them: colours are apart from the text, so all its escapes are foreign."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text, keep="\n\t"), style)


def tracked(
    results: Iterable[T],
    what: str,
    total: int | None = None,
    *,
    of: str = "",
    size: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """Yield the results and show on stderr how many there were: `images: 12,000/25,000`.

    Draws a bar on a terminal and prints a line every LINE_EVERY seconds elsewhere. `total` is the number to
    expect, None if unknown. `of` is the word for what is counted. `size` gives how many a result counts for.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, done, said = Console(stderr=True), 0, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        every = 0.2 if console.is_terminal else LINE_EVERY
        for result in results:
            yield result
            done += 1 if size is None else size(result)
            if (now := time.monotonic()) - said >= every:
                said = now
                line = f"{what}: {done:,}" + (f"/{total:,}" if total else "") + (f" {of}" if of else "")
                progress.update(task, completed=done, description=line)
                if not console.is_terminal:
                    console.print(line, soft_wrap=True, highlight=False)


class Formatter(logging.Formatter):
    """The message as one printable line, and a traceback below it where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        return printable(super().formatMessage(record), keep="\n\t")
