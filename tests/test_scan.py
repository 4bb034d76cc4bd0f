"""What images are, remembered only while they stay as they were; hashes compared."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from conftest import noise_image
from PIL import Image, ImageEnhance
from sources import load

from surgvqa import scan as scanning
from surgvqa.datasets import ImageRef
from surgvqa.demo import scenes
from surgvqa.scan import ImageFacts, alike, near, scan

SHARED = Path(__file__).resolve().parents[2] / "shared/data"


@pytest.fixture
def refs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ImageRef]:
    """Six images in two folders, none of them changed just now, and an empty cache."""
    monkeypatch.setenv("SURGVQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scanning, "_SETTLED_NS", 0)
    made = []
    for number in range(6):
        file = tmp_path / f"data {number % 2}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        noise_image(60 + number, 40, number).save(file)
        made.append(ImageRef(f"{number}", path=file))
    return made


def shelves(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("images-*/*.json"))


def test_facts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("CMYK", (80, 40), (0, 0, 0, 255))  # black
    picture.paste((0, 0, 0, 0), (20, 0, 60, 40))  # and white in the middle
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    facts = scan([ImageRef("a", path=tmp_path / "a.jpg")]).found["a"]
    assert (facts.size, facts.format, facts.mode, facts.turned) == ((40, 80), "JPEG", "CMYK", True)
    assert facts.border == pytest.approx(0.5, abs=0.03)
    assert len(facts.digest or "") == 64
    head = scan([ImageRef("a", path=tmp_path / "a.jpg")], headers=True).found["a"]
    assert head == ImageFacts((40, 80), "JPEG", "CMYK", True)


def test_what_was_seen_is_not_decoded_again(
    refs: list[ImageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan(refs)
    assert (first.decoded, first.faults, first.unkept) == (6, {}, "")
    assert len(shelves(tmp_path)) == 2
    monkeypatch.setattr(scanning, "open_rgb", None)
    again = scan([*refs[:3], ImageRef("renamed", path=refs[3].path)])
    assert again.decoded == 0
    assert again.found == {**{key: first.found[key] for key in "012"}, "renamed": first.found["3"]}


CHANGES: dict[str, Callable[[Path], object]] = {
    "other bytes": lambda file: file.write_bytes(bytes([*file.read_bytes()[:-1], 0])),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "touched": lambda file: os.utime(file, ns=(1, 1)),
    "another file in its place": lambda file: (file.with_name("5.png")).replace(file),
}


@pytest.mark.fault("F18")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_not_trusted(refs: list[ImageRef], change: str) -> None:
    refs = [ref for ref in refs if ref.key != "5"]
    scan(refs)
    file = refs[1].path
    assert file
    CHANGES[change](file)
    again = scan(refs)
    assert again.decoded == 1
    assert again.found["1"].digest == scanning.hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.fault("F18")
def test_a_change_with_size_and_time_put_back_is_seen(refs: list[ImageRef]) -> None:
    scan(refs)
    file = refs[0].path
    assert file
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of the last chunk's checksum, which decoders do not look at
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    again = scan(refs)
    assert again.decoded == 1
    assert again.found["0"].digest == scanning.hashlib.sha256(data).hexdigest()


def test_a_file_changed_just_now_is_not_remembered(
    refs: list[ImageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_SETTLED_NS", 10**12)
    assert scan(refs).decoded == scan(refs).decoded == 6
    assert shelves(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"x": 1}', b'{"\'0.png\'": [[1, 2, 3, 4], {"size": ["1", 2]}]}']
)
def test_a_broken_cache_is_ignored_and_mended(refs: list[ImageRef], tmp_path: Path, content: bytes) -> None:
    first = scan(refs)
    for file in shelves(tmp_path):
        file.write_bytes(content)
    again = scan(refs)
    assert (again.decoded, again.found) == (6, first.found)
    assert scan(refs).decoded == 0


def test_a_cache_that_cannot_be_written_is_told_of(
    refs: list[ImageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SURGVQA_CACHE", str(tmp_path / "file"))
    result = scan(refs)
    assert len(result.found) == 6
    assert "Not a directory" in result.unkept


def test_faults_are_looked_at_again(refs: list[ImageRef]) -> None:
    file = refs[2].path
    assert file
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    assert set(scan(refs).faults) == {"2"}
    assert set(scan(refs).faults) == {"2"}
    file.write_bytes(whole)
    assert scan(refs).faults == {}


def test_cells_of_a_table_are_remembered_until_the_table_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("SURGVQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")

    def decoded(*seeds: int) -> int:
        rows = []
        for seed in seeds:
            buffer = BytesIO()
            noise_image(50, 40, seed).save(buffer, "PNG")
            rows.append(
                {"image": {"bytes": buffer.getvalue(), "path": None}, "question": "Q?", "answer": "a"}
            )
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
        refs = [e.images[0] for e in load("parquet", tmp_path / "train.parquet", by="image").examples]
        result = scan(refs)
        assert [facts.digest for facts in result.found.values()] == [
            scanning.hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows
        ]
        return result.decoded

    assert decoded(1, 2) == 2
    status = (tmp_path / "train.parquet").stat()
    refs = [e.images[0] for e in load("parquet", tmp_path / "train.parquet", by="image").examples]
    assert scan(refs).decoded == 0
    time.sleep(0.01)
    assert decoded(3, 4) == 2
    assert (tmp_path / "train.parquet").stat().st_mtime_ns != status.st_mtime_ns


def test_interrupted_and_going_on(
    refs: list[ImageRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was found before somebody pressed Ctrl-C counts."""
    tracked = scanning.tracked

    def impatient(*given: object) -> object:
        for number, facts in enumerate(tracked(*given)):  # type: ignore[arg-type]
            if number == 4:
                raise KeyboardInterrupt
            yield facts

    with monkeypatch.context() as patch:
        patch.setattr(scanning, "tracked", impatient)
        with pytest.raises(KeyboardInterrupt):
            scan(refs, progress=True)
    assert scan(refs).decoded == 2


def test_processes_at_once_leave_whole_files(refs: list[ImageRef], tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from surgvqa import scan as scanning
from surgvqa.datasets import ImageRef
scanning._SETTLED_NS = scanning._SAVED_EVERY_S = 0
files = [Path(name) for name in sys.argv[1:]]
for _ in range(5):
    result = scanning.scan([ImageRef(str(file), path=file) for file in files])
    assert len(result.found) == len(files) and not result.unkept, result
    for file in scanning._Memory()._root.glob('*.json'):
        try:
            scanning._SHELF.validate_json(file.read_bytes(), strict=True)
        except FileNotFoundError:  # another one was here before
            continue
        file.unlink(missing_ok=True)
"""
    names = [str(ref.path) for ref in refs]
    working = [
        subprocess.Popen([sys.executable, "-c", code, *names], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in working:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_near_is_what_comparing_every_pair_finds() -> None:
    rng = random.Random(0)
    others = [rng.getrandbits(64) for _ in range(300)]
    queries = [
        others[rng.randrange(300)] ^ sum(1 << b for b in rng.sample(range(64), n % 9)) for n in range(70)
    ]
    expected = {}
    for number, query in enumerate(queries):
        bits = [(query ^ other).bit_count() for other in others]
        if min(bits) <= 4:
            expected[number] = min(bits)
    texts = [[f"{value:016x}" for value in values] for values in (queries, others)]
    found = near(*texts, within=4)
    assert {query: bits for query, _, bits in found} == expected
    assert all((queries[a] ^ others[b]).bit_count() == bits for a, b, bits in found)
    assert len(found) > 30
    assert near([], texts[1], 4) == near(texts[0], [], 4) == []
    several = near(*texts, within=20, most=3)
    for query in range(len(queries)):
        bits = sorted((queries[query] ^ other).bit_count() for other in others)
        assert [found for a, _, found in several if a == query] == [each for each in bits[:3] if each <= 20]


def test_hashes_stay_near_when_a_picture_is_saved_again(tmp_path: Path) -> None:
    picture = noise_image(300, 200, 1)
    ways = {
        "same.png": picture,
        "small.png": picture.resize((150, 100)),
        "bright.png": ImageEnhance.Brightness(picture).enhance(1.1),
        "other.png": noise_image(300, 200, 2),
    }
    for name, image in ways.items():
        image.save(tmp_path / name)
    picture.save(tmp_path / "worse.jpg", quality=30)
    Image.new("RGB", (300, 200), (9, 9, 9)).save(tmp_path / "flat.png")
    found = scan([ImageRef(f.name, path=f) for f in tmp_path.iterdir()]).found
    assert found["flat.png"].phash == ""
    for name, is_near in {
        "small.png": True,
        "bright.png": True,
        "worse.jpg": True,
        "other.png": False,
    }.items():
        pair = [found["same.png"].phash or "", found[name].phash or ""]
        assert bool(near(pair[:1], pair[1:], 4)) == is_near, name


def copies_of(picture: Image.Image) -> dict[str, Image.Image]:
    """A picture saved again: worse, smaller, brighter, darker, and all of that."""

    def worse(image: Image.Image) -> Image.Image:
        stream = BytesIO()
        image.save(stream, "JPEG", quality=30)
        return Image.open(stream)

    half = picture.resize((picture.width // 2, picture.height // 2))
    return {
        "worse": worse(picture),
        "half": half,
        "bright": ImageEnhance.Brightness(picture).enhance(1.1),
        "dark": ImageEnhance.Brightness(picture).enhance(0.9),
        "bright and worse": worse(ImageEnhance.Brightness(half).enhance(1.1)),
        "dark and worse": worse(ImageEnhance.Brightness(half).enhance(0.9)),
    }


def kept(image: Image.Image, name: str) -> ImageRef:
    stream = BytesIO()
    image.save(stream, "PNG")
    return ImageRef(name, data=stream.getvalue())


def same(pairs: list[tuple[ImageRef, ImageRef]]) -> list[bool | None]:
    return alike(pairs, scan([ref for pair in pairs for ref in pair]).found)


def test_copies_of_scenes_are_alike_and_other_scenes_are_not() -> None:
    for index in (3, 12):
        scene = scenes.sample_scene(7, index)
        picture = scenes.render(scene)
        copies = copies_of(picture)
        found = same([(kept(picture, "picture"), kept(image, name)) for name, image in copies.items()])
        assert dict(zip(copies, found, strict=True)) == dict.fromkeys(copies, True)
        # A small thing that moved, in front of the same mucosa.
        moved = picture.copy()
        moved.paste(picture.crop((90, 90, 130, 130)).resize((40, 40)).rotate(180), (150, 120))
        others = [scenes.render(scenes.sample_scene(7, index + 1)), moved]
        assert same([(kept(picture, "picture"), kept(other, str(n))) for n, other in enumerate(others)]) == [
            False,
            False,
        ]


def test_frames_of_a_video_are_no_copies_but_saved_again_they_are(shared: Path) -> None:
    frames = sorted((shared / "surgvu25/data/testdata/SURGVU25/case126").glob("*.jpg"))
    refs = [ImageRef(frame.name, path=frame) for frame in frames]
    facts = scan(refs).found
    texts = [facts[ref.key].phash or "" for ref in refs]
    hits = [(a, b) for a, b, _ in near(texts, texts, 4, 99) if a < b]
    assert len(hits) > 20  # by their hashes
    assert alike([(refs[a], refs[b]) for a, b in hits], facts) == [False] * len(hits)
    with Image.open(frames[0]) as picture:
        pairs = [(kept(picture, "0"), kept(image, name)) for name, image in copies_of(picture).items()]
    assert same(pairs) == [True] * 6


def test_few_pictures_are_compared_at_a_time_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a video with thousands of frames alike."""
    monkeypatch.setenv("SURGVQA_CACHE", str(tmp_path / "cache"))
    refs = []
    for number in range(6):
        file = tmp_path / f"{number}.png"
        noise_image(90, 60, 1).resize((90 - number, 60)).save(file)
        os.utime(file, (1, 1))
        refs.append(ImageRef(file.name, path=file))
    monkeypatch.setattr(scanning, "_SETTLED_NS", 0)
    facts, made = scan(refs).found, []
    real = scanning._thumbnail
    monkeypatch.setattr(scanning, "_thumbnail", lambda ref: (made.append(ref.key), real(ref))[1])
    pairs = [(refs[0], other) for other in refs[1:]]
    assert alike(pairs, facts, most=3) == [True, True, None, None, None]
    assert alike(pairs, facts, most=3) == [True] * 5
    assert alike(pairs, scan(refs).found, most=0) == [True] * 5
    assert sorted(made) == [ref.key for ref in refs]


def test_images_of_one_cell_are_remembered_apart(tmp_path: Path) -> None:
    import datasets

    cells = []
    for side in (40, 60):
        stream = BytesIO()
        Image.new("RGB", (side, 30)).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({"image": [cells]})
    refs = [ImageRef(f"{index}", None, table, 0, "image", index) for index in (0, 1)]
    first, again = scan(refs), scan(refs)
    assert (first.decoded, again.decoded) == (2, 0)
    assert [again.found[key].size for key in ("0", "1")] == [(40, 30), (60, 30)]


def test_real_awkward_images() -> None:
    real = SHARED / "awkward"
    if not real.is_dir():
        pytest.skip("the real files are not here; test_facts covers generated ones")
    result = scan([ImageRef(file.name, path=file) for file in sorted(real.iterdir())])
    assert set(result.faults) == {"truncated_jpeg.jpg"}
    modes = {key: facts.mode for key, facts in result.found.items()}
    assert modes["pil_sample_cmyk.jpg"] == "CMYK"
    turned = {key for key, facts in result.found.items() if facts.turned}
    assert turned == {"Landscape_6.jpg", "Portrait_3.jpg"}
    assert json.loads(json.dumps(modes)) == modes
