"""Any data set of the hub, or a local folder that `datasets` loads, with the columns of a table.

Its splits train, validation (or val) and test are the parts; images are embedded, or files of its folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgvqa.datasets import Example, Problem, choices, tables
from surgvqa.datasets.files import encoded, open_hub, table_rows
from surgvqa.datasets.images import Images
from surgvqa.recipe import Source


def read(source: Source) -> Iterator[Example | Problem]:
    """The rows of all splits, of the source's subset where it names one. Raises BadInput."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = source.path or ""
    # Files of a hub data set lie in its part of the cache.
    own = Path(path) if Path(path).exists() else Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
    needed, wanted = tables.columns(source, tables.NEEDED, tables.OPTIONAL)
    wanted += choices.NAMES
    held = tables.names_of(source.columns, "image")
    images = Images(own, source.roots)
    for split, table in open_hub(path, source.revision, source.variant).items():
        place = f"{path} {split}"
        rows = table_rows(encoded(table, held), place, needed, wanted, held)
        yield from tables.examples(rows, source, place, split, tables.part_named(split), images)
