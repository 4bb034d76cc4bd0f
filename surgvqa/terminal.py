"""What is printed: texts of data, model folders and runs are shown, and cannot steer the terminal.

Errors go through `recipe.explain`, log lines through `Formatter`, everything else through `Console`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

import rich.console
from rich.segment import Segment

from surgvqa.recipe import printable

T = TypeVar("T")


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


def tracked(results: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The results as they come, with a bar on stderr where that is a terminal."""
    from rich.progress import track

    console = Console(stderr=True)
    return track(results, what, total, console=console, transient=True, disable=not console.is_terminal)


class Formatter(logging.Formatter):
    """The message as one printable line, and a traceback below it where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        return printable(super().formatMessage(record), keep="\n\t")
