"""Bytes thrown at every reader: a good row or an error with its place, never a crash, hang or silent loss."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS

from surgvqa import datasets
from surgvqa.datasets import Dataset
from surgvqa.recipe import BadInput, Data

TRIES = int(os.environ.get("SURGVQA_FUZZ", "60"))
SLOW = (".parquet",)
"""Files of which a try takes a second rather than a millisecond."""
MAY_LACK = ("coco", "hub", "kvasir_vqa_x1", "surgicalgpt", "surgvu25")
"""Formats that cannot know of a file or folder that is not there: of a part (the audit does) or a case."""
PIECES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"{", b"[" * 3000, b"\\", b"\n", b"\r", b"\x85", b"|",
    b",", b";", b"NaN", b"null", b"1e999", b"-1", b"true", b"../../etc/passwd", b"/dev/zero", b"http://x/y.png",
    b"\xe2\x80\xae", b"\\ud800", b"<box>", b"<image>", b"9" * 5000, b"{}", b"[]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A reader that waits, for a pipe or for ever, is interrupted."""

    def ring(*_: object) -> None:
        raise TimeoutError("the reader hangs")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


pytestmark = pytest.mark.usefixtures("hub_cache")


def load(format: str, keys: dict[str, Any]) -> Dataset | BadInput:
    """What becomes of the data; anything else that is raised fails the test."""
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        return datasets.load(Data.model_validate({"format": format, **keys}))
    except BadInput as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def sound(result: Dataset | BadInput, folder: Path) -> None:
    """Every good row is whole, every problem says what and where."""
    if isinstance(result, BadInput):
        assert result.problems
        assert all(problem.strip() for problem in result.problems)
        return
    for problem in result.problems:
        assert problem.place.strip()
        assert problem.what.strip()
        str(problem).encode()
    ids = [example.id for example in result.examples]
    assert len(set(ids)) == len(ids)
    for example in result.examples:
        assert example.split in ("train", "val", "test")
        assert example.images
        for text in (example.id, example.question, *example.answers, example.question_type):
            assert text.strip()
            assert "\0" not in text
            text.encode()
            assert text.lower() != "nan"
        for image in example.images:
            assert image.path is None or image.path.resolve().is_relative_to(folder.resolve())
            assert image.path is None or image.path.is_file()


def skippable(before: Dataset, after: Dataset | BadInput) -> None:
    """`data.on_error: skip` can only leave out single rows, or all rows of an image: more is of the whole."""
    errors = [] if isinstance(after, BadInput) else [p for p in after.problems if not p.warning]
    if isinstance(after, BadInput) or not errors or any(problem.whole for problem in errors):
        return
    left = {example.place for example in after.examples}
    lost = [example for example in before.examples if example.place not in left]
    one_image = len({example.image_key for example in lost}) == 1
    assert one_image or len({example.place for example in lost}) <= len(errors), "skipped without a word"


def files_of(folder: Path) -> list[Path]:
    """What a reader reads: all but images."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix not in (".png", ".jpg", ".jpeg"))


def replaced(data: bytes, rng: random.Random) -> bytes:
    """A few bytes within a line are others; no line begins or ends."""
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(changed))
        if changed[place] not in b"\r\n":
            changed[place] = rng.choice(b'\0\x01\x7f\x80\xc3\xff"\\{}[],|;:09azAZ<>/')
    return bytes(changed)


def torn(data: bytes, rng: random.Random) -> bytes:
    """Cut, doubled, shuffled, or with something in between."""
    first, second = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return rng.choice(
        [
            data[:first],
            data[second:],
            data[:first] + data[second:],
            data[:second] + data[first:],
            data[:first] + rng.choice(PIECES) + data[first:],
            data[:first] + rng.choice(PIECES) + data[second:],
            data[:first] + rng.randbytes(rng.randint(1, 50)) + data[first:],
            b"".join(lines),
            rng.randbytes(rng.randint(0, 300)),
            data.decode("utf-8", "replace").encode("utf-16"),
            b"",
        ]
    )


def tries(name: str, files: list[Path]) -> int:
    return 4 if any(file.suffix in SLOW for file in files) else TRIES


def gone(path: Path) -> None:
    """Puts nothing there."""


def test_every_format_has_a_layout() -> None:
    assert LAYOUTS.keys() == datasets.MODULES.keys()


@pytest.mark.parametrize("name", sorted(datasets.MODULES))
def test_the_layout_is_sound(name: str, tmp_path: Path) -> None:
    result = load(name, LAYOUTS[name](tmp_path))
    assert isinstance(result, Dataset)
    assert result.examples
    assert [problem for problem in result.problems if not problem.warning] == []
    sound(result, tmp_path)


@pytest.mark.fault("F17")
@pytest.mark.parametrize("change", [replaced, torn], ids=["replaced", "torn"])
@pytest.mark.parametrize("name", sorted(datasets.MODULES))
def test_bytes_changed(name: str, change: Callable[[bytes, random.Random], bytes], tmp_path: Path) -> None:
    keys = LAYOUTS[name](tmp_path)
    files = files_of(tmp_path)
    whole = load(name, keys)
    assert isinstance(whole, Dataset)
    rng = random.Random(f"{name} {change.__name__}")
    said = 0
    for number in range(tries(name, files)):
        file = rng.choice(files)
        before = file.read_bytes()
        file.write_bytes(change(before, rng))
        result = load(name, keys)
        try:
            sound(result, tmp_path)
            told = isinstance(result, BadInput) or {*map(str, result.problems)} - {*map(str, whole.problems)}
            said += bool(told)
            if change is replaced and isinstance(result, Dataset):
                # Lines are as many as they were: who has fewer rows has said why.
                lost = len(whole.examples) - len(result.examples)
                assert lost <= 0 or told
                skippable(whole, result)
        except AssertionError:
            kept = tmp_path / "bytes"
            shutil.copyfile(file, kept)
            why = f"try {number}: {file.name} with the bytes of {kept}: {result}"
            raise AssertionError(why) from None
        file.write_bytes(before)
    assert said


@pytest.mark.fault("F16", "F17")
@pytest.mark.parametrize("name", sorted(datasets.MODULES))
def test_other_things_in_the_place_of_files(name: str, tmp_path: Path) -> None:
    """A pipe, a folder, a link to nowhere and one to itself, for every file and folder in turn."""
    keys = LAYOUTS[name](tmp_path / "data")
    aside = tmp_path / "aside"
    things = [p for p in sorted((tmp_path / "data").rglob("*")) if p.suffix not in SLOW]
    replacements: list[Callable[[Path], None]] = [
        os.mkfifo,
        Path.mkdir,
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: path.symlink_to(path),
        gone,
    ]
    whole = load(name, keys)
    assert isinstance(whole, Dataset)
    before = {*map(str, whole.problems)}
    for thing in things:
        for put in replacements:
            thing.rename(aside)
            put(thing)
            lacks = put is gone or (put is Path.mkdir and aside.is_dir())
            result = load(name, keys)
            try:
                sound(result, tmp_path / "data")
                told = isinstance(result, BadInput) or {*map(str, result.problems)} - before
                assert told or (name in MAY_LACK and lacks), "silently lost"
                skippable(whole, result)
            except AssertionError as error:
                raise AssertionError(f"{thing} replaced by {put}: {error}: {result}") from None
            if thing.is_dir() and not thing.is_symlink():
                thing.rmdir()
            else:
                thing.unlink(missing_ok=True)
            aside.rename(thing)
