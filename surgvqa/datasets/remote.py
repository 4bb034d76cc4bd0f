"""Find out within seconds whether the Hugging Face hub can be reached."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from surgvqa.terminal import Console

PATIENCE_S = 6
"""Time limit for the hub's first answer. Its own clients retry for half a minute."""


def unreachable(what: str) -> str:
    """Return why the hub cannot be reached; "" if it answers, or if `HF_HUB_OFFLINE` forbids to ask.

    The main process prints on stderr that `what` is being fetched.
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
    """Return why a server does not answer; "" if it answers, with whatever status. Asks once per process."""
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

    # The library's own limit holds for each address and each read, so it may take many times as long.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    why = result[0] if result else f"no answer within {PATIENCE_S} s"
    return f"{endpoint} cannot be reached ({why})" if why else ""
