"""Augmentation: picture and boxes move together, alike in every process, and never in evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import noise_image, write_jsonl
from PIL import Image

from surgvqa import cli, evaluation, processes, recipe
from surgvqa.augment import MOST_LOST, Augmentation, Augmented, endoscopy
from surgvqa.banner import banner
from surgvqa.datasets import Region
from surgvqa.grounding import source_pixels
from surgvqa.letterbox import Canvas, draw, open_rgb, plan_canvas
from surgvqa.memory import Fit, fit
from surgvqa.prepare import Prepared, prepare
from surgvqa.replay import replay
from surgvqa.show import show
from surgvqa.terminal import Console
from surgvqa.train import _jobs, train
from surgvqa.tree import Questions, packs

STRONG = Augmentation(zoom=1.08, angle=9, shift_x=-0.07, shift_y=0.05)


def letterbox(size: tuple[int, int], side: int = 448) -> Canvas:
    return plan_canvas(size, mode="letterbox", size=side, max_tokens=None, factor=28)


def native(size: tuple[int, int], max_tokens: int = 120) -> Canvas:
    return plan_canvas(size, mode="native", size=None, max_tokens=max_tokens, factor=28)


def augmented(image: Image.Image, canvas: Canvas, by: Augmentation, fill: str = "black") -> Image.Image:
    return Augmented(canvas, by).place(canvas.scale(image), fill)


def psnr(one: Image.Image, other: Image.Image, edge: int = 24) -> float:
    inside = slice(edge, -edge)
    a, b = (np.asarray(image).astype(float)[inside, inside] for image in (one, other))
    return float(10 * math.log10(255**2 / ((a - b) ** 2).mean()))


# ---- the picture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 360), (97, 331), (448, 448), (1920, 1080)])
@pytest.mark.parametrize("plan", [letterbox, native])
def test_no_augmentation_is_the_plain_canvas_to_the_pixel(size: tuple[int, int], plan: Any) -> None:
    image = noise_image(*size, seed=1)
    canvas = plan(size)
    plain = draw(image, canvas, "#203040")
    assert np.array_equal(augmented(image, canvas, Augmentation(), "#203040"), plain)
    moved = augmented(image, canvas, STRONG, "#203040")
    assert moved.size == plain.size
    assert not np.array_equal(moved, plain)


def test_a_large_source_is_averaged_not_sampled() -> None:
    """Against the same map onto a canvas of four times the side, averaged: the definition."""
    size, side = (1920, 1080), 448
    rng = np.random.default_rng(0)
    fine = np.asarray(noise_image(*size, seed=4)).astype(float) + rng.normal(0, 25, (1080, 1920, 1))
    image = Image.fromarray(np.clip(fine, 0, 255).astype(np.uint8))
    large = augmented(image, letterbox(size, 4 * side), STRONG)
    reference = large.resize((side, side), Image.Resampling.BICUBIC)
    canvas = letterbox(size, side)
    sampled = image.resize(canvas.drawn_size, Image.Resampling.NEAREST)
    assert psnr(augmented(image, canvas, STRONG), reference) > 35
    assert psnr(Augmented(canvas, STRONG).place(sampled, "black"), reference) < 25


def test_colours_change_and_what_is_beside_the_picture_does_not() -> None:
    image = noise_image(300, 100, seed=2)
    canvas = letterbox(image.size)
    plain, bright, pale = (
        np.asarray(augmented(image, canvas, by, "#102030")).astype(int)
        for by in (Augmentation(), Augmentation(brightness=1.2, contrast=0.8), Augmentation(saturation=0.8))
    )
    top = canvas.offset_y
    assert (bright[:top] == (16, 32, 48)).all()
    picture, brighter, paler = (shown[top : top + canvas.drawn_size[1]] for shown in (plain, bright, pale))
    assert brighter.mean() > picture.mean() * 1.1
    assert np.ptp(paler, axis=2).mean() == pytest.approx(0.8 * np.ptp(picture, axis=2).mean(), rel=0.05)


# ---- boxes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [letterbox, native])
@pytest.mark.parametrize("angle", [-10.0, 0.0, 6.5])
def test_a_box_moves_with_what_it_surrounds(plan: Any, angle: float) -> None:
    source = Image.new("RGB", (900, 600), "black")
    source.paste("white", (250, 170, 520, 330))
    canvas = plan(source.size)
    moved = Augmented(canvas, replace(STRONG, angle=angle))
    pixels = np.asarray(moved.place(canvas.scale(source), "black"))[:, :, 0] > 127
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert moved.to_canvas((250, 170, 520, 330)) == pytest.approx(found, abs=1.5)


def test_what_leaves_the_canvas_is_cut_off_a_box() -> None:
    canvas = native((400, 400))
    right = Augmented(canvas, Augmentation(shift_x=0.25))
    assert right.to_canvas((300, 0, 400, 400))[2] == canvas.width
    assert right.shown((300, 0, 400, 400)) == 0
    assert right.shown((200, 0, 400, 400)) == pytest.approx(0.5)
    assert right.shown((0, 0, 100, 100)) == pytest.approx(1)


def test_movements_that_would_hide_a_box_are_drawn_anew() -> None:
    canvas = native((400, 400))
    corner = (canvas, (380.0, 380.0, 400.0, 400.0))
    free = [endoscopy(1, epoch, "a") for epoch in range(60)]
    kept = [endoscopy(1, epoch, "a", [corner]) for epoch in range(60)]
    assert any(Augmented(canvas, by).shown(corner[1]) < 1 - MOST_LOST for by in free)
    assert all(Augmented(canvas, by).shown(corner[1]) >= 1 - MOST_LOST for by in kept)
    same = [by == other for by, other in zip(free, kept, strict=True)]
    assert any(same)
    assert not all(same)
    # Nothing but colours where no movement will do.
    corners = [
        (canvas, box) for box in ((0, 0, 1, 1), (399, 0, 400, 1), (0, 399, 1, 400), (399, 399, 400, 400))
    ]
    still = endoscopy(1, 0, "a", [(where, tuple(map(float, box))) for where, box in corners])
    assert (still.zoom, still.angle, still.shift_x, still.shift_y) == (1, 0, 0, 0)
    assert still.brightness == free[0].brightness


# ---- what is drawn ------------------------------------------------------------------------------------


def test_draws_keep_to_their_ranges_and_fill_them() -> None:
    drawn = [endoscopy(3, epoch, f"image {epoch % 7}") for epoch in range(2000)]
    for name, low, high in (
        ("zoom", 1, 1 / 0.9), ("angle", -10, 10), ("shift_x", -0.156, 0.156), ("shift_y", -0.156, 0.156),
        ("brightness", 0.8, 1.2), ("contrast", 0.8, 1.2), ("saturation", 0.8, 1.2),
    ):  # fmt: skip
        values = [getattr(by, name) for by in drawn]
        assert low <= min(values) < low + 0.15 * (high - low)
        assert high - 0.15 * (high - low) < max(values) <= high
    assert len(set(drawn)) == len(drawn)
    assert endoscopy(3, 5, "x") == endoscopy(3, 5, "x")
    assert len({endoscopy(3, 5, "x"), endoscopy(4, 5, "x"), endoscopy(3, 6, "x"), endoscopy(3, 5, "y")}) == 4


# ---- in training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data"), images=10)


def ready(data: Path, *overrides: str) -> Prepared:
    text = f"""
model: {{name: tiny-qwen3-vl, tune: full}}
data: {{format: jsonl, path: {data}}}
image: {{mode: letterbox, size: 96, augment: endoscopy}}
batch: {{questions: 6, questions_per_image: 3, tokens_per_micro_batch: 200}}
train: {{precision: fp32, seed: 5}}
eval: {{max_new_tokens: 4}}
output: {data.parent / "run"}
"""
    return prepare(recipe.parse(text, overrides))


def seen(
    prepared: Prepared, *, start: int = 0, total: int, world: int = 1, workers: int = 0
) -> dict[tuple[int, str], bytes]:
    """(step, image) → its patches, as training with so many processes and workers gets them."""
    found: dict[tuple[int, str], bytes] = {}
    for rank in range(world):
        questions = prepared.questions("train")
        plan = prepared.plan(questions)
        steps = [step for step in range(start, total) for _ in plan.share(plan.step(step), world)[rank]]
        jobs = [((trees), trees, epoch) for _, trees, epoch in _jobs(plan, start, total, rank, world)]
        for step, (trees, pack) in zip(steps, packs(questions, jobs, workers=workers), strict=True):
            sizes = [int(rows * columns) for _, rows, columns in pack.grids]
            for tree, patches in zip(trees, pack.patches.split(sizes), strict=True):
                name = step, questions.examples[tree[0]].image_key
                shown = patches.numpy().tobytes()
                assert found.setdefault(name, shown) == shown
    return found


@pytest.mark.fault("F25")
def test_pictures_are_those_of_the_epoch_however_training_runs(data: Path) -> None:
    prepared = ready(data)
    plan = prepared.plan(prepared.questions("train"))
    per_epoch, total = plan.steps_per_epoch, 2 * plan.steps_per_epoch + 1
    alone = seen(prepared, total=total)
    assert seen(prepared, total=total, workers=2) == alone
    resumed = seen(prepared, start=per_epoch + 1, total=total)
    assert resumed == {name: shown for name, shown in alone.items() if name[0] > per_epoch}
    together = seen(prepared, total=total, world=2)
    assert together.items() >= alone.items()
    whole = seen(ready(data, "batch.tokens_per_micro_batch=4000", "batch.trees=false"), total=total)
    assert whole == alone
    assert seen(ready(data, "train.seed=6"), total=1).items() - alone.items()

    by_epoch: dict[str, dict[int, set[bytes]]] = {}
    for (step, image), shown in alone.items():
        by_epoch.setdefault(image, {}).setdefault(step // per_epoch, set()).add(shown)
    assert all(len(shown) == 1 for epochs in by_epoch.values() for shown in epochs.values())
    assert all(len(epochs) == len(set.union(*epochs.values())) >= 2 for epochs in by_epoch.values())


def test_without_augmentation_every_epoch_shows_the_plain_canvas(data: Path) -> None:
    plain, moving = (ready(data, f"image.augment={how}").questions("train") for how in ("none", "endoscopy"))
    for questions, epochs in ((plain, (None, 0, 1)), (moving, (None,))):
        for epoch in epochs:
            packed = questions.pack([[0, 1]], epoch=epoch)
            assert packed.patches.equal(plain.pack([[0, 1]]).patches)
    assert not moving.pack([[0]], epoch=0).patches.equal(plain.pack([[0]]).patches)
    assert moving.pack([[0]], epoch=0).tokens == plain.pack([[0]]).tokens


def test_frames_of_one_question_move_alike(data: Path) -> None:
    made = ready(data).questions("train")
    first, other = made.examples[0].images[0], made.examples[-1].images[0]
    clip = replace(
        made.examples[0], images=(first, other), regions=(Region((0.9, 0.9, 1, 1), image=1, relative=True),)
    )
    questions = Questions([clip], made.chat, made.canvases, augment="endoscopy", seed=5)
    for epoch in range(20):
        one, two = questions.placements(0, epoch)
        assert isinstance(one, Augmented)
        assert isinstance(two, Augmented)
        assert one.by == two.by
        assert two.shown(source_pixels(clip.regions[0], two.source_size).box) >= 1 - MOST_LOST


def test_evaluation_and_the_memory_probe_see_plain_canvases(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(*overrides: str) -> list[str]:
        prepared = ready(data, *overrides)
        compute = processes.compute("fp32", "sdpa", accelerator.device)
        questions = prepared.questions("val", asked=True)
        network = prepared.network()
        predicted = evaluation.predict(network, prepared, questions, accelerator=accelerator, compute=compute)
        return [prediction.answer for prediction in predicted]

    from surgvqa.loss import TreeLoss

    accelerator = Accelerator(cpu=True)
    plain = answers("image.augment=none")
    monkeypatch.setattr(Augmented, "place", None)  # nobody asks for it
    assert answers() == plain
    prepared = ready(data)
    questions = prepared.questions("train")
    loss = TreeLoss(prepared.network(), attn="sdpa", autocast=None)
    found = fit(
        loss, questions, prepared.plan(questions), range(3), tokens=200, layers=0, accelerator=accelerator
    )
    assert found.tokens_per_micro_batch == 200


def test_the_border_is_cropped_in_training_and_in_evaluation(tmp_path: Path) -> None:
    """The recipe's crop decides every part's canvases and, in mode native, their token counts."""
    source = write_jsonl(tmp_path / "framed", images=10)
    sizes = {}
    for number in range(9):  # the last stays as it is
        inner = Image.open(tmp_path / f"framed/{number}.png").convert("RGB")
        sizes[number] = inner.size
        framed = Image.new("RGB", (inner.width + 120, inner.height + 60))
        framed.paste(Image.blend(inner, Image.new("RGB", inner.size, "white"), 0.5), (80, 10))
        framed.save(tmp_path / f"framed/{number}.png")
    native = "image={mode: native, max_tokens: 400, crop: border}"
    prepared, plain = ready(source, native), ready(source, native, "image.crop=none")
    for key, canvas in prepared.canvases.items():
        before = plain.canvases[key]
        width, height = before.source_size
        inside = (80, 10, width - 40, height - 50) if key != "9.png" else (0, 0, width, height)
        assert canvas.picture == pytest.approx(inside, abs=2)
        assert canvas.source_size == before.source_size
        assert canvas.to_source(canvas.to_canvas((85, 15, 100, 30))) == pytest.approx((85, 15, 100, 30))
    for part in ("train", "val", "test"):
        small, large = prepared.questions(part), plain.questions(part)  # type: ignore[arg-type]  # see above
        assert small.root_tokens.sum() < large.root_tokens.sum()
        packed = small.pack([[0]])
        assert packed.tokens == prepared.plan(small).tokens([0])
        assert len(packed.patches) == 4 * packed.image_at.numel()
    shares = [width * height / (width + 120) / (height + 60) for width, height in sizes.values()]
    said = f"crop: border, off 9 of 10 images, to {sum(shares) / 9:.0%} of their area; augment: none"
    assert banner_line(prepared) == said


def banner_line(prepared: Prepared) -> str:
    accelerator = Accelerator(cpu=True)
    questions = prepared.questions("train")
    plan, compute = prepared.plan(questions), processes.compute("fp32", "sdpa", accelerator.device)
    lines = banner(
        prepared, questions, plan, prepared.network(), accelerator, compute, Fit(200, 0, 0), total=1, start=0
    )
    (line,) = (line for line in lines if "augment: " in line)
    return line.strip()


def test_the_banner_says_it(data: Path) -> None:
    assert banner_line(ready(data)) == "crop: none; augment: endoscopy"


def test_show_an_epoch(data: Path, tmp_path: Path) -> None:
    settings = ready(data).recipe
    console = Console(quiet=True)
    for name, epoch in (("plain", None), ("first", 0), ("again", 0), ("second", 1)):
        show(settings, "train", 0, tmp_path / name, console, epoch)
    shown = {name: (tmp_path / name / "canvas-0.png").read_bytes() for name in ("plain", "first", "second")}
    assert len(set(shown.values())) == 3
    assert (tmp_path / "again/canvas-0.png").read_bytes() == shown["first"]
    assert "zoom=" in (tmp_path / "first/tree.html").read_text()
    image = prepare(settings).questions("train").examples[0].images[0]
    canvas = prepare(settings).canvases[image.key]
    assert np.array_equal(
        Image.open(tmp_path / "plain/canvas-0.png"), draw(open_rgb(image.read()), canvas, "black")
    )
    command = ["show", str(data.parent / "recipe.yaml"), "--epoch", "1", "--out", str(tmp_path / "command")]
    (data.parent / "recipe.yaml").write_text(settings.dump(), encoding="utf-8")
    assert cli.main(command) == 0
    assert (tmp_path / "command/canvas-0.png").read_bytes() == shown["second"]
    for part, how, epoch in (("val", "endoscopy", 0), ("train", "none", 0), ("train", "endoscopy", -1)):
        other = ready(data, f"image.augment={how}").recipe
        with pytest.raises(recipe.BadInput, match="only the images of train differ by epoch"):
            show(other, part, 0, tmp_path, console, epoch)  # type: ignore[arg-type]  # from a table of words


def test_a_run_and_the_replay_of_its_step_train_on_the_moved_pictures(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    place = Augmented.place
    monkeypatch.setattr(Augmented, "place", lambda *given: moved.append(given[0].by) or place(*given))
    options = ["train.max_steps=2", "eval.final=null", "log.trace=true", "checkpoint.every=1"]
    settings = ready(data, *options, f"output={tmp_path / 'run'}").recipe
    run = train(settings)
    trained = moved.copy()
    moved.clear()
    loss, _ = replay(settings, 2, Console(quiet=True))
    row = json.loads((run / "trace.jsonl").read_text().splitlines()[1])
    assert loss == pytest.approx(float.fromhex(row["loss"]), rel=1e-5)
    assert 0 < len(set(moved)) < len(set(trained))
    assert set(moved) < set(trained)
