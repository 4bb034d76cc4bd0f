"""What is printed: texts of data, model folders and runs are shown, and cannot steer the terminal.

Errors go through `recipe.explain`, log lines through `Formatter`, everything else through `Console`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import rich.console
from rich.segment import Segment

from surgvqa.recipe import printable

T = TypeVar("T")

LINE_EVERY = 10.0
"""Seconds between two lines about work that goes on, where there is no terminal to draw a bar on."""


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
    """Yield the results as they come; show on stderr how many there were: `images: 12,000/25,000`.

    On a terminal it is a bar, elsewhere a line every LINE_EVERY seconds. `total` is how many are expected,
    None where nobody knows; `of` says what they are; a result may count for several, its `size`.
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
