"""What the images of a data set are, found by decoding each completely, once, in parallel, and remembered.

    ImageRefs ── scan ──▶ Scan(found: key → ImageFacts, faults: key → what is wrong)

What was found is kept in `$SURGVQA_CACHE`, so that the next check and the start of training decode only what
is new. An entry counts while the file has the size, times and inode that it had, and this code is the same.
Faults are not kept.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from surgvqa import letterbox
from surgvqa.datasets import MAX_BYTES, ImageRef
from surgvqa.demo import cached
from surgvqa.letterbox import Rectangle, Size, find_picture, header, open_rgb
from surgvqa.terminal import tracked

_THUMB = 256
"""The hash is taken from the image scaled down to at most twice this side, in pixels."""

_FLAT = 16
"""Images whose grey values span less than this have no structure to compare."""

_SIDE = 32
"""Rows, and columns, of the thumbnails that `alike` compares."""

_BRIGHT = 228
"""Grey values from which on a copy that is a tenth brighter may be saturated (255 / 1.1 = 232)."""

_CUT = 3
"""A cell of a thumbnail is not compared if more than 3 / 255 of its area reach _BRIGHT."""

_FEWEST = 16
"""Fewest cells to compare: with fewer, two pictures count as different."""

DIFFERENT = 12
"""Largest difference, in grey levels of 255, between a cell of a thumbnail and that of its copy.

Measured on 105 pictures of surgical data sets and 30 scenes of the demo. Copies differ by at most 8.5 in
their worst cell: as JPEG of quality 30, of half, three quarters or a square size, 10 % brighter or darker,
and of half size, 10 % brighter or darker, as JPEG. Of 25 pairs of other pictures with alike hashes, frames of
one video, the closest differ by 15.7, the next by 33."""

LOOKED_AT = 4000
"""Most thumbnails that one audit makes; it also uses those that earlier ones made."""

_SAVED_EVERY_S = 20

_SETTLED_NS = 10**9
"""A file changed so recently could change again without its times showing it: it is not remembered."""


@checked(frozen=True, slots=True)
class ImageFacts:
    """One sound image. What only pixels tell is None where only the header was read."""

    size: Size
    """Width and height in pixels, EXIF orientation applied."""
    format: str
    mode: str
    """As stored: PIL's name of the pixels' type."""
    turned: bool
    """Whether EXIF turns or mirrors it."""
    digest: str | None = None
    """SHA-256 of its bytes."""
    picture: Rectangle | None = None
    """Where its picture is, without a black border: `letterbox.find_picture`."""
    phash: str | None = None
    """Perceptual hash of 64 bits as hexadecimal digits, "" of an image without structure; None where the
    library was not there."""
    thumbnail: str | None = None
    """Thumbnail for `alike` as base64: grey values, then one bit per cell to compare; None until made."""

    @property
    def border(self) -> float | None:
        """Share of its area that is black border."""
        if self.picture is None:
            return None
        x1, y1, x2, y2 = self.picture
        return 1 - (x2 - x1) * (y2 - y1) / (self.size[0] * self.size[1])


@dataclass
class Scan:
    found: dict[str, ImageFacts] = field(default_factory=dict)
    """Image key → facts, of sound images."""
    faults: dict[str, str] = field(default_factory=dict)
    """Image key → what is wrong with it."""
    decoded: int = 0
    """How many had to be looked at; the others were remembered."""
    unkept: str = ""
    """Why nothing could be remembered, if so."""


def hashes() -> bool:
    """Whether the library for perceptual hashes, ImageHash, is installed."""
    return find_spec("imagehash") is not None


def cores() -> int:
    """The cores that this process may use: under SLURM a few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan(refs: Iterable[ImageRef], *, headers: bool = False, progress: bool = False) -> Scan:
    """Look at images; nothing is raised for what is wrong with them.

    `headers`: read only headers of those that are not remembered. `progress` shows a bar on stderr. One
    thread per core decodes, so as many images are in memory at once.
    """
    result, memory = Scan(), _Memory()
    unknown = []
    wanted = hashes() and not headers
    for ref in refs:
        known = memory.get(ref)
        if known is None or (wanted and known.phash is None):
            unknown.append(ref)
        else:
            result.found[ref.key] = replace(known, thumbnail=None)  # only `alike` needs it
    look = _header if headers else _facts
    result.decoded = len(unknown)
    pool = ThreadPoolExecutor(cores())
    try:
        looked = pool.map(look, unknown)
        shown = tracked(looked, "images", len(unknown)) if progress else looked
        for ref, facts in zip(unknown, shown, strict=True):
            if isinstance(facts, str):
                result.faults[ref.key] = facts
            else:
                result.found[ref.key] = facts
                if not headers:
                    memory.add(ref, facts)
    finally:  # also where somebody does not want to wait: the next one goes on from here
        pool.shutdown(cancel_futures=True)
        result.unkept = memory.save()
    return result


def _header(ref: ImageRef) -> ImageFacts | str:
    try:
        if ref.path is None:
            head = header(ref.read())
        elif ref.path.stat().st_size > MAX_BYTES:
            return f"is larger than {MAX_BYTES >> 30} GiB"
        else:
            with ref.path.open("rb") as file:
                head = header(file)
    except OSError as error:
        return _unreadable(error)
    except ValueError as error:
        return str(error)
    return ImageFacts(head.size, head.format, head.mode, head.turned)


def _facts(ref: ImageRef) -> ImageFacts | str:
    try:
        data = ref.read()
        head, image = header(data), open_rgb(data)
    except OSError as error:
        return _unreadable(error)
    except ValueError as error:
        return str(error)
    small = image.reduce(max(1, max(image.size) // _THUMB)).convert("L")
    return ImageFacts(
        head.size,
        head.format,
        head.mode,
        head.turned,
        hashlib.sha256(data).hexdigest(),
        find_picture(image),
        _phash(small),
    )


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _phash(grey: Image.Image) -> str | None:
    if not hashes():
        return None
    least, most = grey.getextrema()
    if most - least < _FLAT:  # type: ignore[operator]  # of one band these are two numbers
        return ""
    import imagehash  # brings scipy, and only this needs it

    return str(imagehash.phash(grey))


def near(
    queries: Sequence[str], others: Sequence[str], within: int, most: int = 1
) -> list[tuple[int, int, int]]:
    """Return for each of `queries` the `most` nearest of `others` of which at most `within` bits differ.

    Both are 64-bit hashes as hexadecimal digits. Returns (query, other, bits) as indices. Every pair is
    compared, on all cores: 77,000 × 33,000 take seconds, and memory stays at some megabytes.
    """
    if not queries or not others:
        return []
    left, right = (np.array([int(text, 16) for text in texts], np.uint64) for texts in (queries, others))

    def block(start: int) -> list[tuple[int, int, int]]:
        bits = np.bitwise_count(left[start : start + 16, None] ^ right)
        pairs = []
        for row in np.flatnonzero(bits.min(1) <= within):
            hits = np.flatnonzero(bits[row] <= within)
            hits = hits[np.argsort(bits[row, hits], kind="stable")[:most]]
            pairs += [(start + int(row), int(hit), int(bits[row, hit])) for hit in hits]
        return pairs

    pool = ThreadPoolExecutor(cores())
    try:
        return [pair for pairs in pool.map(block, range(0, len(left), 16)) for pair in pairs]
    finally:
        pool.shutdown(cancel_futures=True)


def alike(
    pairs: Sequence[tuple[ImageRef, ImageRef]], facts: Mapping[str, ImageFacts], most: int = LOOKED_AT
) -> list[bool | None]:
    """Return for each pair of images whether their pixels are those of one picture; None if not compared.

    Decodes images of `pairs` in parallel and remembers their thumbnails. Makes at most `most` of them, for
    the first pairs: if a video has thousands of similar frames, each call compares some more.
    """
    memory = _Memory()
    grids: dict[str, _Grid] = {}
    wanted: dict[str, ImageRef] = {}
    for pair in pairs:
        for ref in pair:
            known = memory.get(ref)
            if known is not None and known.thumbnail is not None:
                grids[ref.key] = _grid(known.thumbnail)
            else:
                wanted.setdefault(ref.key, ref)
    refs = list(wanted.values())[:most]
    with ThreadPoolExecutor(cores()) as pool:
        for ref, text in zip(refs, pool.map(_thumbnail, refs), strict=True):
            if text is not None:
                grids[ref.key] = _grid(text)
                memory.add(ref, replace(facts[ref.key], thumbnail=text))
    memory.save()
    return [
        _same(grids[one.key], grids[other.key]) if one.key in grids and other.key in grids else None
        for one, other in pairs
    ]


_Grid = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""(cells,) grey values of a thumbnail, and (cells,) whether to compare each."""


def _thumbnail(ref: ImageRef) -> str | None:
    """Return what `ImageFacts.thumbnail` holds; None where the image can no longer be read."""
    try:
        grey = open_rgb(ref.read()).convert("L")
    except (OSError, ValueError):
        return None
    bright = grey.point([0] * _BRIGHT + [255] * (256 - _BRIGHT))
    small = (each.resize((_SIDE, _SIDE), Image.Resampling.HAMMING) for each in (grey, bright))
    values, cut = (np.asarray(each).ravel() for each in small)
    return base64.b64encode(values.tobytes() + np.packbits(cut <= _CUT).tobytes()).decode()


def _grid(thumbnail: str) -> _Grid:
    data = np.frombuffer(base64.b64decode(thumbnail), np.uint8)
    cells = _SIDE * _SIDE
    return data[:cells].astype(np.float64), np.unpackbits(data[cells:], count=cells).astype(bool)


def _same(one: _Grid, other: _Grid) -> bool:
    """Return whether two thumbnails show one picture, whatever its brightness and contrast."""
    cells = one[1] & other[1]
    if cells.sum() < _FEWEST:
        return False
    first, second = one[0][cells], other[0][cells]
    return max(_misfit(first, second), _misfit(second, first)) <= DIFFERENT


def _misfit(values: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """Return the largest difference of `target` from the line through `values` that fits it best."""
    apart, from_mean = values - values.mean(), target - target.mean()
    slope = (apart @ from_mean) / max(apart @ apart, 1e-9)
    return float(np.abs(from_mean - slope * apart).max())


Stamp = tuple[int, int, int, int]
"""Size, time of the content's and of the inode's last change in ns, inode; zeros for a cell of a table, whose
fingerprint stands for its content."""

_SHELF = TypeAdapter(dict[str, tuple[Stamp, ImageFacts]])


class _Memory:
    """Facts on disk: one file for each folder of images, replaced as a whole.

    Processes that write the same one at once may lose each other's entries, which are then found again; a
    reader always sees a whole file. One that is not as it should be counts as empty.
    """

    def __init__(self) -> None:
        self._root = cached(f"images-{PIL.__version__}", Path(__file__), Path(letterbox.__file__))
        self._shelves: dict[str, dict[str, tuple[Stamp, ImageFacts]]] = {}
        self._new: dict[str, dict[str, tuple[Stamp, ImageFacts]]] = defaultdict(dict)
        self._stamps: dict[str, Stamp] = {}
        self._saved = time.monotonic()
        self._fault = ""

    def get(self, ref: ImageRef) -> ImageFacts | None:
        """What is known of an image as it is now."""
        slot = _slot(ref)
        if slot is None:
            return None
        shelf, name, self._stamps[ref.key] = slot
        if shelf not in self._shelves:
            self._shelves[shelf] = self._read(self._file(shelf))
        stamp, facts = self._shelves[shelf].get(name, (None, None))
        return facts if stamp == slot[2] else None

    def add(self, ref: ImageRef, facts: ImageFacts) -> None:
        """Remember what was found since `get`, unless the image changed meanwhile or may do so unseen."""
        slot = _slot(ref)
        if slot is None or slot[2] != self._stamps.get(ref.key):
            return
        shelf, name, stamp = slot
        if time.time_ns() - max(stamp[1:3]) < _SETTLED_NS:
            return
        self._new[shelf][name] = stamp, facts
        if time.monotonic() - self._saved > _SAVED_EVERY_S:
            self.save()

    def save(self) -> str:
        """Write what is new; returns why that was not possible, if so."""
        for shelf, entries in self._new.items():
            file = self._file(shelf)
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                content = _SHELF.dump_json(self._read(file) | entries)
                _replace(file, content)
            except OSError as error:
                self._fault = f"{error.filename or file}: {error.strerror}"
        self._new.clear()
        self._saved = time.monotonic()
        return self._fault

    def _file(self, shelf: str) -> Path:
        return self._root / f"{hashlib.sha256(os.fsencode(shelf)).hexdigest()[:32]}.json"

    @staticmethod
    def _read(file: Path) -> dict[str, tuple[Stamp, ImageFacts]]:
        try:
            return _SHELF.validate_json(file.read_bytes(), strict=True)
        except (OSError, ValidationError):
            return {}


def _slot(ref: ImageRef) -> tuple[str, str, Stamp] | None:
    """Where an image's facts are kept: folder, name in it, and what tells that it is unchanged."""
    if ref.data is not None:
        return None
    if ref.path is None:
        # What `datasets` itself tells contents apart by: made of the files' digests or sizes and times.
        return f"table {ref.table._fingerprint}", f"{ref.row} {ref.column} {ref.index}", (0, 0, 0, 0)
    try:
        status = ref.path.stat()
    except OSError:
        return None
    folder, name = os.path.split(os.path.abspath(ref.path))  # noqa: PTH100  # Path has none that keeps links
    stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    return folder, ascii(name), stamp


def _replace(file: Path, content: bytes) -> None:
    handle, aside = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(aside).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(aside).unlink()
        raise
