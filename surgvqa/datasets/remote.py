"""The hub as a place that may be out of reach: found out in seconds, and told."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from surgvqa.terminal import Console

PATIENCE_S = 6
"""How long the hub may take to answer at all. Without this limit its clients try again for half a minute."""


def unreachable(what: str) -> str:
    """Return why the hub cannot be reached, "" where it answers or `HF_HUB_OFFLINE` forbids to ask.

    `what` is to be fetched; the main process says so on stderr.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(
            f"fetching {what} from {constants.ENDPOINT}", soft_wrap=True, highlight=False
        )
    return _silence_of(constants.ENDPOINT)


@functools.cache
def _silence_of(endpoint: str) -> str:
    """Return why a server does not answer, "" where it does, whatever it says. Asked once in a process."""
    from huggingface_hub import get_session

    result: list[str] = []

    def ask() -> None:
        try:
            session: Any = get_session()
            session.head(endpoint, timeout=PATIENCE_S)
        except Exception as error:  # of the HTTP library that the client uses, which differs by version
            result.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        else:
            result.append("")

    # The library's limit holds for each address of a name and each read, hence a limit for all of it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    why = result[0] if result else f"no answer within {PATIENCE_S} s"
    return f"{endpoint} cannot be reached ({why})" if why else ""
