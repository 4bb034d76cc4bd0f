"""A demo that needs no download: procedural endoscopy scenes and tiny models that can learn them."""

import hashlib
import os
import tempfile
from pathlib import Path


def cached(name: str, *code: Path) -> Path:
    """Where something that surgvqa generates is kept: `$SURGVQA_CACHE`, else `~/.cache/surgvqa`.

    The folder's name ends in a digest of the code that generates it, the files given or else this package,
    so changed code never meets old files.
    """
    digest = hashlib.sha256()
    for file in code or sorted(Path(__file__).parent.iterdir()):
        if file.suffix in (".py", ".jinja"):
            digest.update(file.read_bytes())
    return cache_root() / f"{name}-{digest.hexdigest()[:12]}"


def cache_root() -> Path:
    """Return the folder of the cache; a temporary folder for a user without a home."""
    if given := os.environ.get("SURGVQA_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "surgvqa"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"surgvqa-{os.getuid()}"
