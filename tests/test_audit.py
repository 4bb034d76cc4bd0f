"""The audit finds broken images, leaks, unseen answers and conflicts, and says where."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from conftest import noise_image
from PIL import Image
from sources import load

from surgvqa import recipe, scan
from surgvqa.audit import Audit, audit, load_and_audit, repeated, report
from surgvqa.datasets import Dataset, Example, ImageRef, Problem, Region
from surgvqa.recipe import Part

SHARED = Path(__file__).resolve().parents[2] / "shared/data"


def check(dataset: Dataset, by: str = "official", mode: str = "letterbox") -> Audit:
    return audit(dataset, mode=mode, by=by)


def found(result: Audit) -> str:
    return report(result.problems)


class Builder:
    """Examples on images of its own folder; an image not yet there is drawn in a colour of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.examples: list[Example] = []

    def add(self, image: str, part: Part, answer: str = "yes", group: str = "", question: str = "Q?") -> None:
        path = self.folder / image
        if not path.exists():
            Image.new("RGB", (40, 30), (len(list(self.folder.iterdir())), 0, 0)).save(path)
        number = len(self.examples) + 1
        ref = ImageRef(image, path=path)
        self.examples.append(
            Example(
                str(number), (ref,), question, (answer,), group=group, split=part, place=f"q.jsonl:{number}"
            )
        )

    def dataset(self, *problems: Problem) -> Dataset:
        return Dataset(self.examples, problems)


@pytest.fixture
def build(tmp_path: Path) -> Builder:
    builder = Builder(tmp_path)
    for part in ("train", "val", "test"):
        builder.add(f"{part}.png", part, group=f"video of {part}")
    return builder


def test_sound_data(build: Builder) -> None:
    result = check(build.dataset())
    assert result.problems == []
    assert result.sizes == {"train.png": (40, 30), "val.png": (40, 30), "test.png": (40, 30)}
    assert found(result) == "0 errors, 0 warnings"


@pytest.mark.fault("F15")
def test_broken_images_are_named_with_their_questions(build: Builder) -> None:
    good = BytesIO()
    Image.effect_noise((64, 64), 80).save(good, "JPEG")
    (build.folder / "cut.jpg").write_bytes(good.getvalue()[:-200])
    (build.folder / "text.jpg").write_text("an error page")
    (build.folder / "empty.jpg").touch()
    Image.new("1", (9_900, 9_000)).save(build.folder / "bomb.png")
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "bomb.png"):
        build.add(name, "train")
    for _ in range(4):
        build.add("cut.jpg", "train")
    build.add("gone.png", "train")
    (build.folder / "gone.png").unlink()
    result = check(build.dataset())
    lines = re.sub(r"\d+ bytes not processed", "n bytes not processed", found(result)).splitlines()
    assert lines == [
        "error: image cut.jpg: cannot be decoded: image file is truncated (n bytes not processed) "
        "(5 questions: q.jsonl:4, q.jsonl:8, q.jsonl:9, ...)",
        "error: image text.jpg: is not an image (none of JPEG, PNG, BMP, TIFF, WEBP, GIF, PPM) "
        "(1 question: q.jsonl:5)",
        "error: image empty.jpg: is empty (0 bytes) (1 question: q.jsonl:6)",
        "error: image bomb.png: has 9900×9000 pixels, more than the 89 million allowed "
        "(1 question: q.jsonl:7)",
        "error: image gone.png: cannot be read: No such file or directory (1 question: q.jsonl:12)",
        "5 errors, 0 warnings",
    ]
    assert sorted(result.sizes) == ["test.png", "train.png", "val.png"]


@pytest.mark.fault("F15")
def test_sizes_are_those_of_the_turned_image(build: Builder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 20)).save(build.folder / "turned.jpg", exif=exif)
    build.add("turned.jpg", "train")
    assert check(build.dataset()).sizes["turned.jpg"] == (20, 50)


def test_an_image_too_long_for_native(build: Builder) -> None:
    Image.new("RGB", (1000, 2)).save(build.folder / "thread.png")
    build.add("thread.png", "train")
    assert check(build.dataset()).problems == []
    assert "error: image thread.png: 1000×2 is too long" in found(check(build.dataset(), mode="native"))


def test_empty_parts(tmp_path: Path) -> None:
    build = Builder(tmp_path)
    build.add("a.png", "test")
    assert found(check(build.dataset())).splitlines() == [
        "error: train: holds no questions",
        "warning: val: holds no questions",
        "1 error, 1 warning",
    ]


def test_an_empty_final_part_is_told_of(tmp_path: Path) -> None:
    """A run would end without a score."""
    assert "eval.final: the val part holds" not in "".join(
        labelled(tmp_path, "eval.final=val", "eval.every=null")
    )
    rows = [line for line in (tmp_path / "q.jsonl").read_text().splitlines() if '"val"' not in line]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    text = f"""
model: {{name: tiny-qwen3-vl}}
data: {{format: jsonl, path: {tmp_path / "q.jsonl"}}}
image: {{size: 96}}
eval: {{final: val}}
output: runs/x
"""
    _, result = load_and_audit(recipe.parse(text))
    assert "warning: eval.final: the val part holds no questions" in report(result.problems)


def test_images_in_two_parts(build: Builder) -> None:
    for number in range(7):
        build.add(f"{number}.png", "train")
        build.add(f"{number}.png", "test")
    build.add("0.png", "val")
    (line, counts) = found(check(build.dataset())).splitlines()
    assert line.startswith(
        "error: split: 7 of 10 images are in two parts or more "
        "(1 in train and val and test; 6 in train and test): "
        "0.png, 1.png, 2.png, 3.png, 4.png, ...; "
    )
    assert counts == "1 error, 0 warnings"


def test_groups_in_two_parts_are_an_error_unless_the_split_is_by_image(build: Builder) -> None:
    build.add("more.png", "test", group="video of train")
    assert "error: split: 1 of 3 groups are in two parts" in found(check(build.dataset()))
    assert "error: split: 1 of 3 groups" in found(check(build.dataset(), by="group"))
    by_image = check(build.dataset(), by="image")
    assert (
        "warning: split: 1 of 3 groups are in two parts or more (1 in train and test): video of train"
        in found(by_image)
    )
    assert found(by_image).endswith("0 errors, 1 warning")


def test_copies_under_another_name(build: Builder) -> None:
    (build.folder / "copy.png").write_bytes((build.folder / "train.png").read_bytes())
    build.add("copy.png", "train")
    assert check(build.dataset()).problems == []
    build.examples.pop()
    build.add("copy.png", "test")
    assert (
        "warning: split: 1 picture in two parts or more under different names: train.png = copy.png"
        in found(check(build.dataset()))
    )


def test_one_data_set_read_twice_leaks(build: Builder) -> None:
    """Its pictures have other names then, and a hash of them puts them elsewhere."""
    (build.folder / "copy.png").write_bytes((build.folder / "train.png").read_bytes())
    build.add("copy.png", "test")
    last = build.examples[-1]
    build.examples[-1] = replace(last, images=(replace(last.images[0], key="1//copy.png"),))
    assert "error: split: 1 picture in two parts or more under different names" in found(
        check(build.dataset())
    )


def test_boxes_alone_are_told_of(build: Builder) -> None:
    build.add("train.png", "train", answer="", question="Where is it?")
    build.examples[-1] = replace(build.examples[-1], regions=(Region((0, 0, 20, 20)),))
    assert "1 answer of boxes without words" in found(check(build.dataset()))


def test_boxes_that_a_crop_cuts_off_are_errors(build: Builder) -> None:
    picture = Image.new("RGB", (200, 100))
    picture.paste("#808080", (100, 0, 200, 100))
    picture.save(build.folder / "half.png")
    for box in ((0, 0, 50, 50), (80, 0, 150, 50)):
        build.add("half.png", "train", question=f"What is in {box}?")
        build.examples[-1] = replace(build.examples[-1], asked_regions=(Region(box),))
    assert "cuts off" not in found(check(build.dataset()))
    said = found(audit(build.dataset(), mode="letterbox", crop="border"))
    assert said.count("is in the border that image.crop cuts off") == 1


def test_boxes_in_pixels_of_another_size_are_errors(build: Builder) -> None:
    build.add("train.png", "train", question="What is there?")
    build.examples[-1] = replace(build.examples[-1], asked_regions=(Region((0, 0, 9, 9), of=(1280, 1024)),))
    assert "in pixels of 1280×1024, but the image has 40×30" in found(check(build.dataset()))


def test_answers_never_seen_in_train(build: Builder) -> None:
    for answer in ("x", "x", "Yes"):
        build.add("test.png", "test", answer, question=f"Q{len(build.examples)}?")
    assert (
        "warning: test: 3 of 4 questions have an answer never seen in train: 'x' (2), 'Yes' (1)\n"
        in found(check(build.dataset()))
    )


def test_an_answer_with_a_reference_seen_in_train_is_seen(build: Builder) -> None:
    ref = build.examples[2].images[0]
    build.examples.append(Example("9", (ref,), "R?", ("no", "yes"), split="test", place="q.jsonl:9"))
    assert check(build.dataset()).problems == []


def labelled(tmp_path: Path, *overrides: str) -> list[str]:
    """What the audit says of labels: val and test are evaluated, and test has an answer like none other."""
    rows = [
        ("train", "count", "1"), ("train", "count", "many"), ("train", "yes_no", "yes"),
        ("train", "where", "top"),
        ("val", "count", ["several", "2."]), ("val", "yes_no", "no"),
        ("test", "count", "3"), ("test", "count", "3"), ("test", "yes_no", "b; a"), ("test", "where", "left"),
    ]  # fmt: skip
    lines = []
    for number, (part, kind, answer) in enumerate(rows):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "question": f"Q{number}?", "answer": answer, "question_type": kind}
        lines.append(json.dumps({**row, "split": part}) + "\n")
    (tmp_path / "q.jsonl").write_text("".join(lines), encoding="utf-8")
    text = f"""
model: {{name: tiny-qwen3-vl}}
data: {{format: jsonl, path: {tmp_path / "q.jsonl"}, list_answers: alternatives}}
image: {{size: 96}}
eval: {{every: 1}}
output: runs/x
"""
    dataset, found = load_and_audit(recipe.parse(text, overrides))
    assert len(dataset.examples) == len(rows)
    said = report([problem for problem in found.problems if "never seen in train" not in problem.what])
    return said.replace(str(tmp_path / "q.jsonl"), "q.jsonl").splitlines()[:-1]


COUNTS = "data.labels.count=['1', '2', '2 or 1']"


def test_answers_to_choose_among_must_be_there(tmp_path: Path) -> None:
    assert labelled(tmp_path) == []
    assert labelled(tmp_path, "eval.answers=labels", COUNTS, "data.labels.yes_no=[yes, no, a; b]") == [
        "error: q.jsonl:7: 2 answers of the type count not among its labels: '3' (2), and so never right; "
        "mend data.labels or the data, or set eval.answers: generate",
        "error: eval.answers: labels needs a closed set of answers of every question type; where has none. "
        "List the answers of each in the recipe, as data.labels.where, or set eval.answers: generate",
        "warning: q.jsonl:2: 1 answer of the type count not among its labels: 'many' (1)",
    ]
    # Only val is evaluated, which has no question of the type where.
    sets = [COUNTS, "data.labels.yes_no=[yes, no]"]
    said = labelled(tmp_path, "eval.answers=labels", *sets, "eval.final=null")
    assert [line.split(" not among")[0] for line in said] == [
        "warning: q.jsonl:2: 3 answers of the type count",
        "warning: q.jsonl:9: 1 answer of the type yes_no",
    ]
    none = labelled(tmp_path, "eval.answers=labels")
    assert len(none) == 1
    assert "count, where, yes_no have none" in none[0]


def test_labels_are_looked_at_even_where_answers_are_generated(tmp_path: Path) -> None:
    assert labelled(tmp_path, COUNTS, "data.labels.phase=[one, two]") == [
        "warning: data.labels: no question has the type phase; the data has count, where, yes_no",
        "warning: q.jsonl:2: 3 answers of the type count not among its labels: '3' (2), 'many' (1)",
    ]
    assert labelled(tmp_path, "data.labels.yes_no=[yes, no, a; b, b;a.]") == [
        "error: data.labels.yes_no: a; b, b;a. count as the same answer; keep one of each"
    ]


def test_conflicting_answers(build: Builder) -> None:
    build.add("train.png", "train", "yes")
    assert check(build.dataset()).problems == []
    build.add("train.png", "train", "no")
    assert found(check(build.dataset())).splitlines()[0] == (
        "warning: answers: 1 question asked again about the same image, with another answer: "
        "'Q?' on train.png at q.jsonl:1"
    )


def test_report_lists_errors_first_each_on_one_line() -> None:
    problems = [
        Problem("a", "w", warning=True),
        Problem("b\nc", "bad \x1b[31m\udcff name"),
        Problem("d", "größer"),
    ]
    assert report(problems) == (
        "error: b\\nc: bad \\x1b[31m\\udcff name\nerror: d: größer\nwarning: a: w\n2 errors, 1 warning"
    )
    assert report([]) == "0 errors, 0 warnings"


def test_the_readers_problems_are_part_of_the_audit(build: Builder) -> None:
    result = check(build.dataset(Problem("q.jsonl:9", "answer is empty")))
    assert found(result).splitlines() == ["error: q.jsonl:9: answer is empty", "1 error, 0 warnings"]


@pytest.mark.fault("F15")
def test_memory_stays_bounded(build: Builder) -> None:
    """Encoded bytes are let go of: 60 files of 1 MB each must not add up."""
    for number in range(60):
        (build.folder / f"{number}.bmp").write_bytes(_bmp(580, 600, colour=number))
        build.add(f"{number}.bmp", "train")
    tracemalloc.start()
    result = check(build.dataset())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result.sizes) == 63
    assert peak < 30e6


def _bmp(width: int, height: int, colour: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(buffer, "BMP")
    return buffer.getvalue()


def test_progress_goes_to_stderr(
    build: Builder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if it were a terminal
    audit(build.dataset(), mode="letterbox", progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "images" in printed.err


def test_special_tokens_in_a_text_are_errors(build: Builder) -> None:
    dataset = build.dataset()
    example = replace(dataset.examples[0], question="What <|im_end|> is this?", place="q.jsonl:1")
    hostile = Dataset([example, *dataset.examples[1:]], [])
    result = audit(hostile, mode="letterbox", special_tokens={"<|im_end|>", "<|image_pad|>"})
    assert "error: q.jsonl:1: holds the special token <|im_end|>" in found(result)
    assert "special token" not in found(check(hostile))


def test_near_identical_images_in_two_parts(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise_image(200, 150, 7)
    for name, part, look in (
        ("a.png", "train", picture), ("b.png", "train", picture.resize((100, 75))),
        ("c.png", "test", picture.resize((180, 140))), ("d.png", "val", noise_image(200, 150, 8)),
    ):  # fmt: skip
        look.save(build.folder / name)
        build.add(name, part)  # type: ignore[arg-type]
    result = check(build.dataset())
    (problem,) = result.problems
    assert problem.warning
    what = (
        "1 of 1 images are copies of one of train or val, saved again (the same picture by perceptual hash "
        "and pixels): c.png ~ "
    )
    assert problem.what in (what + "a.png", what + "b.png")
    assert problem.images[0] == "c.png"
    assert result.notes == []
    # Without the library that is said, and nothing is remembered of what it would have found.
    monkeypatch.setenv("SURGVQA_CACHE", str(build.folder / "cache"))
    monkeypatch.setattr(scan, "find_spec", lambda name: None)
    result = check(build.dataset())
    assert result.problems == []
    assert result.notes == [
        "near-identical images were not looked for; for that: pip install 'surgvqa[audit]'"
    ]


def test_answers_that_differ_only_in_case_or_punctuation_are_counted_by_type(build: Builder) -> None:
    for number, answer in enumerate(["No", "No", "no", "Yes!", "yes", "1.5", "15", "not relevant"]):
        build.add(f"{number}.png", "train", answer, question=answer)
    build.add("a.png", "train", "lower-right", question="Where?")
    where = [replace(build.examples[-1], question_type="where")]
    labels = ("specimen_bag", "specimenbag")  # a corpus's own two labels
    for number, answer in enumerate(["Lower right", *labels, "specimenbag"]):
        build.add(f"where {number}.png", "train", answer, question=f"Where? {number}")
        where.append(replace(build.examples[-1], question_type="where"))
    where[2:4] = [replace(each, labels=labels) for each in where[2:4]]
    told = [p for p in check(Dataset([*build.examples[3:11], *where], [])).problems if "ways" in p.what]
    assert list(map(str, told)) == [
        "q.jsonl:6: 2 answers of the type question written in ways that differ only in case or punctuation, "
        "which exact match tells apart: 'No' (2) and 'no' (1); 'Yes!' (1) and 'yes' (1); "
        "write each in one way",
        "q.jsonl:13: 1 answer of the type where written in ways that differ only in case or punctuation, "
        "which exact match tells apart: 'lower-right' (1) and 'Lower right' (1); write each in one way",
    ]
    assert all(problem.warning for problem in told)


def test_junk_answers_are_counted(build: Builder) -> None:
    for number, answer in enumerate(["N/A", "n/a", "?", *["none"] * 40, *["polyp"] * 60]):
        build.add("train.png", "train", answer, question=f"Which, {number}?")
    (said,) = check(build.dataset()).problems
    assert str(said) == ("q.jsonl:4: 3 answers that stand for a missing value: 'N/A' (1), 'n/a' (1), '?' (1)")
    # Where hardly any answer is none, it is a gap.
    for number in range(4000):
        build.add("train.png", "train", "polyp", question=f"Which else, {number}?")
    (said,) = check(build.dataset()).problems
    assert "43 answers that stand for a missing value: 'none' (40)" in said.what
    build.add("train.png", "train", "yes", question="None")
    assert "1 question that stands for a missing value: 'None' (1)" in found(check(build.dataset()))


def test_a_video_of_two_data_sets_in_different_parts(tmp_path: Path) -> None:
    for name, part in (("cholec80", "train"), ("ssg", "test")):
        (tmp_path / name).mkdir()
        noise_image(60, 50, len(name)).save(tmp_path / name / "a.png")
        row = {
            "image": "a.png",
            "question": "Q?",
            "answer": "yes",
            "group": "cholec80/video01",
            "split": part,
        }
        (tmp_path / name / "q.jsonl").write_text(json.dumps(row) + "\n")
    more = [{"format": "jsonl", "path": str(tmp_path / "ssg" / "q.jsonl")}]
    said = found(check(load("jsonl", tmp_path / "cholec80" / "q.jsonl", more=more)))
    assert (
        "error: split: 1 of 1 groups are in two parts or more (1 in train and test): cholec80/video01; the "
        f"first in train at {tmp_path}/cholec80/q.jsonl:1, test at {tmp_path}/ssg/q.jsonl:1; " in said
    )


def test_questions_there_again_are_counted(build: Builder) -> None:
    for _ in range(3):
        build.add("train.png", "train")
    assert repeated(build.dataset()) == 3
    assert check(build.dataset()).problems == []


def test_headers_alone(build: Builder) -> None:
    Image.effect_noise((64, 64), 80).save(build.folder / "cut.jpg")
    (build.folder / "cut.jpg").write_bytes((build.folder / "cut.jpg").read_bytes()[:-200])
    build.add("cut.jpg", "train")
    result = audit(build.dataset(), mode="letterbox", headers=True)
    assert result.problems == []
    assert result.sizes["cut.jpg"] == (64, 64)
    assert result.digests == {}
    assert result.notes[0].startswith("of 4 images only the headers were read")


def test_skip_leaves_out_what_is_bad_and_says_so(build: Builder) -> None:
    (build.folder / "text.jpg").write_text("an error page")
    build.add("text.jpg", "test", group="video of train")  # a leak, were it not left out
    build.add("text.jpg", "test")
    build.add("val.png", "val", question="What <|im_end|> is this?")
    bad = Problem("q.jsonl:99", "answer is empty"), Problem("q.jsonl:99", "image is missing")
    dataset = build.dataset(*bad, Problem("data", "has warned", warning=True))
    result = audit(dataset, mode="letterbox", special_tokens={"<|im_end|>"}, skip=True)
    assert [str(problem) for problem in result.problems] == [
        "q.jsonl:99: answer is empty; left out",
        "q.jsonl:99: image is missing; left out",
        "data: has warned",
        "image text.jpg: is not an image (none of JPEG, PNG, BMP, TIFF, WEBP, GIF, PPM) "
        "(2 questions: q.jsonl:4, q.jsonl:5); left out",
        "q.jsonl:6: holds the special token <|im_end|>, which would break the conversation; left out",
    ]
    assert all(problem.warning for problem in result.problems)
    assert result.counts == {"rows": 2, "images": 1, "questions": 2}
    assert [e.id for e in result.kept(dataset).examples] == ["1", "2", "3"]
    strict = audit(dataset, mode="letterbox", special_tokens={"<|im_end|>"})
    assert sum(not problem.warning for problem in strict.problems) == 5  # those four, and the leak
    assert (strict.skipped, strict.left_out) == ([], frozenset())


def test_skip_does_not_hide_what_is_not_about_rows(build: Builder) -> None:
    build.add("train.png", "test")
    whole = Problem("q.csv:1", "lacks the columns image", whole=True)
    said = found(audit(build.dataset(whole), mode="letterbox", skip=True))
    assert "error: q.csv:1: lacks the columns image\n" in said
    assert "error: split: 1 of 3 images" in said
    for image in build.folder.iterdir():
        image.write_text("")
    assert "error: data.on_error: skip leaves out everything" in found(
        audit(build.dataset(), mode="letterbox", skip=True)
    )


def test_real_frames() -> None:
    real = SHARED / "real_frames.jsonl"
    if not real.exists():
        pytest.skip("no real frames here; test_sound_data covers generated ones")
    result = check(load("jsonl", real, by="image"), by="image")
    assert len(result.sizes) == 19
    assert not [problem for problem in result.problems if not problem.warning]


def test_a_question_about_another_box_is_another_question(build: Builder) -> None:
    build.add("train.png", "train", "liver", question="What is in <box>?")
    build.add("train.png", "train", "colon", question="What is in <box>?")
    asked = [
        replace(example, asked_regions=(Region((0, 0, number, 9)),) * ("<box>" in example.question))
        for number, example in enumerate(build.examples)
    ]
    assert not any("asked again" in str(problem) for problem in check(Dataset(asked, [])).problems)
    alike = [replace(example, asked_regions=asked[-1].asked_regions) for example in asked[-2:]]
    assert "'What is in <box>?' on train.png" in found(check(Dataset([*asked[:-2], *alike], [])))
