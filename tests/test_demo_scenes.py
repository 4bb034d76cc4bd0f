"""Demo scenes: the same bytes every time, answers that follow from the facts, and a fair prior."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from surgvqa.demo import scenes

SEED = 7
Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row for index in range(scenes.IMAGES) for row in scenes.rows(SEED, index)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.write_demo(tmp_path_factory.mktemp("scenes") / "demo", images=24).parent


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_bytes_in_another_process(demo: Path, tmp_path: Path) -> None:
    code = f"from surgvqa.demo.scenes import write_demo; write_demo({str(tmp_path / 'again')!r}, images=24)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
    assert len(_hashes(demo)) == 25
    assert _hashes(demo) == _hashes(tmp_path / "again")


def test_seed_and_index_make_the_picture(demo: Path) -> None:
    pictures = [value for path, value in _hashes(demo).items() if path.startswith("images")]
    assert len(set(pictures)) == 24
    one, other = (scenes.render(scenes.sample_scene(seed, 3)) for seed in (7, 8))
    assert one.tobytes() != other.tobytes()


def test_half_a_folder_is_completed_and_a_finished_one_kept(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "00001.jpg").write_text("half written")
    (folder / "notes.txt").write_text("not ours")
    listing = scenes.write_demo(folder, images=2)
    assert _hashes(folder / "images") == {
        name: value for name, value in _hashes(demo / "images").items() if name in ("00000.jpg", "00001.jpg")
    }
    assert (folder / "notes.txt").read_text() == "not ours"
    before = listing.read_bytes()
    assert scenes.write_demo(folder, images=3) == listing
    assert listing.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scene: scenes.Scene) -> Image.Image:
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        scenes.write_demo(tmp_path / "demo", images=2)
    assert not list(tmp_path.iterdir())


def test_listing_points_at_pictures(demo: Path) -> None:
    lines = [json.loads(line) for line in (demo / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [row for index in range(24) for row in scenes.rows(SEED, index)]
    assert len({line["id"] for line in lines}) == len(lines)
    for line in lines:
        assert set(line) == {"id", "image", "question", "answer", "question_type", "group", "split"}
    for name in {line["image"] for line in lines}:
        index = int(Path(name).stem)
        with Image.open(demo / name) as picture:
            assert picture.size == scenes.sample_scene(SEED, index).size
            assert picture.mode == "RGB"


def test_numbers_of_images_questions_and_types(rows: list[Row]) -> None:
    per_image = Counter(row["image"] for row in rows)
    assert len(per_image) == scenes.IMAGES >= 400
    assert set(per_image.values()) == {5, 6, 7, 8, 9}
    assert {row["question_type"] for row in rows} == {"yes_no", "count", "which", "where", "colour", "state"}
    for image in list(per_image)[:50]:
        asked = [row["question"] for row in rows if row["image"] == image]
        assert len(set(asked)) == len(asked)


def test_splits_keep_cases_whole(rows: list[Row]) -> None:
    images, parts = defaultdict(set), defaultdict(set)
    for row in rows:
        images[row["split"]].add(row["image"])
        parts[row["group"]].add(row["split"])
    assert len(images["test"]) >= 60
    assert len(images["val"]) >= 40
    assert not images["train"] & (images["test"] | images["val"])
    assert not images["test"] & images["val"]
    assert all(len(splits) == 1 for splits in parts.values())


def test_sizes_vary(rows: list[Row]) -> None:
    sizes = {scenes.sample_scene(SEED, index).size for index in range(scenes.IMAGES)}
    assert len(sizes) >= 5
    shapes = [width / height for width, height in sizes]
    assert min(shapes) < 1 < 1.3 < max(shapes)


def test_prior_is_beatable(rows: list[Row]) -> None:
    """The commonest train answer to each question is right on at most 60 % of the test."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["split"] == "train":
            counts[row["question"]][row["answer"]] += 1
    test = [row for row in rows if row["split"] == "test"]
    right = sum(counts[row["question"]].most_common(1)[0][0] == row["answer"] for row in test)
    assert 0.45 <= right / len(test) <= 0.60


def test_every_answer_is_seen_in_training(rows: list[Row]) -> None:
    trained = {(row["question"], row["answer"]) for row in rows if row["split"] == "train"}
    assert {(row["question"], row["answer"]) for row in rows} == trained


def test_answers_follow_from_the_facts() -> None:
    """Answers worked out a second time, from the facts alone."""
    for index in range(300):
        scene = scenes.sample_scene(SEED, index)
        tools = scene.instruments
        assert len({tool.side for tool in tools}) == len({tool.kind for tool in tools}) == len(tools)
        asked = {question.question: question.answer for question in scenes.questions(scene)}
        expected = {
            "Is there bleeding?": "no" if scene.blood is None else "yes",
            "Is a grasper in view?": "yes" if "grasper" in [tool.kind for tool in tools] else "no",
            "Is a polyp visible?": "yes" if len(scene.polyps) else "no",
            "How many polyps are visible?": f"{len(scene.polyps)}",
            "How many instruments are in view?": f"{len(tools)}",
            "What colour is the mucosa?": scene.mucosa,
            "Is the view clear, smoky or dark?": scene.view,
        }
        if len(tools) == 1:
            expected["Which instrument is in view: grasper, scissors or hook?"] = tools[0].kind
            expected["What colour is the shaft of the instrument?"] = tools[0].shaft
            expected["From which side does the instrument enter?"] = tools[0].side
            if tools[0].jaws:
                expected["Are the jaws open or closed?"] = tools[0].jaws
        spots = [("Where is the polyp?", scene.polyps[0])] if len(scene.polyps) == 1 else []
        spots += [("Where is the bleeding?", scene.blood)] if scene.blood else []
        for text, spot in spots:
            expected[text] = f"{'upper' if spot.y < 0 else 'lower'} {'left' if spot.x < 0 else 'right'}"
        if scene.polyps:
            expected["What colour is the polyp tissue?"] = scene.polyp_colour
        assert asked.items() <= expected.items()


def test_facts_can_be_seen_in_the_picture() -> None:
    """In clear views, pixels in the middle of a pool of blood are red and those of a white polyp are pale."""
    seen: Counter[str] = Counter()
    for index in range(60):
        scene = scenes.sample_scene(SEED, index)
        if scene.view != "clear" or scene.instruments:
            continue
        pixels = np.asarray(scenes.render(scene), dtype=np.float64)
        for kind, spots in (("blood", [scene.blood] if scene.blood else []), ("polyp", list(scene.polyps))):
            for spot in spots:
                red, green, blue = _middle(pixels, spot)
                seen[kind] += 1
                if kind == "blood":
                    assert red > 3 * max(green, blue)
                else:
                    assert (min(red, green, blue) > 120) == (scene.polyp_colour == "white")
        assert pixels[0, 0].max() < 20, "the corner lies outside the round view"
    assert seen["blood"] >= 3
    assert seen["polyp"] >= 3


def _middle(pixels: np.ndarray, spot: scenes.Spot) -> tuple[float, float, float]:
    height, width = pixels.shape[:2]
    radius = scenes.VIEW_RADIUS * min(width, height)
    column, line = round(width / 2 + spot.x * radius), round(height / 2 + spot.y * radius)
    red, green, blue = pixels[line - 4 : line + 5, column - 4 : column + 5].reshape(-1, 3).mean(0)
    return float(red), float(green), float(blue)


def test_import_is_light() -> None:
    code = "import sys, surgvqa.demo.scenes; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1]).returncode == 0
    )
