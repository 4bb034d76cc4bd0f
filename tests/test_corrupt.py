"""Corrupted pictures: always the same ones, worse from level to level, and what their names say."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_image
from numpy.typing import NDArray
from PIL import Image

from surgvqa import corrupt
from surgvqa.corrupt import KINDS, LEVELS, Corruption, parse
from surgvqa.demo.scenes import render, sample_scene
from surgvqa.letterbox import open_rgb
from surgvqa.recipe import BadInput

ROOT = Path(__file__).parents[1]
SHAPES = ["smoke", "blood", "specular"]


@cache
def scene(number: int, size: tuple[int, int] | None = None) -> Image.Image:
    image = render(sample_scene(7, number))
    return image.resize(size, Image.Resampling.BICUBIC) if size else image


def pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


def changed(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(pixels(one) - pixels(other)).mean())


def psnr(one: Image.Image, other: Image.Image) -> float:
    return float(10 * np.log10(255**2 / ((pixels(one) - pixels(other)) ** 2).mean()))


# ---- worse from level to level ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 3, 40, 41])
def test_a_picture_gets_worse_from_level_to_level(kind: str, number: int) -> None:
    image = scene(number)
    worse = [Corruption(kind, level)(image, "a") for level in LEVELS]
    differences = [changed(image, each) for each in worse]
    noise = [psnr(image, each) for each in worse]
    assert differences[0] > 0.1
    assert all(after > 1.04 * before for before, after in pairwise(differences))
    assert all(after < before for before, after in pairwise(noise))


@pytest.mark.parametrize("kind", SHAPES)
def test_every_level_has_the_shapes_of_the_one_before(kind: str) -> None:
    """No pixel gets better again."""
    image = scene(5)
    before = np.zeros(pixels(image).shape)
    for level in LEVELS:
        now = np.abs(pixels(Corruption(kind, level)(image, "a")) - pixels(image))
        assert (now >= before - 1).all()  # a grey value of rounding
        before = now


def test_real_pictures_get_worse_too(shared: Path) -> None:
    for name in ("polyp.jpg", "kvasir-instrument.jpg"):
        image = open_rgb((shared / "images" / "simula" / name).read_bytes())
        image.thumbnail((448, 448))
        for kind in KINDS:
            found = [changed(image, Corruption(kind, level)(image, name)) for level in LEVELS]
            assert all(after > 1.04 * before for before, after in pairwise(found)), kind


# ---- always the same ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_of_a_picture_follows_from_kind_level_and_key(kind: str) -> None:
    image = scene(1, (160, 128))
    before = image.tobytes()
    corruption = Corruption(kind, 3)
    first, again = corruption(image, "a"), pickle.loads(pickle.dumps(corruption))(image, "a")
    other = corruption(image, "b\udcff")  # a file's name need not be UTF-8
    assert image.tobytes() == before
    assert (first.mode, first.size) == ("RGB", image.size)
    assert first.tobytes() == again.tobytes()
    assert (first.tobytes() == other.tobytes()) == (kind in ("blur", "jpeg"))


def test_another_process_makes_the_same() -> None:
    code = """
import hashlib
from surgvqa.corrupt import KINDS, Corruption
from surgvqa.demo.scenes import render, sample_scene
image = render(sample_scene(7, 2))
print(hashlib.sha256(b"".join(Corruption(kind, 4)(image, "a").tobytes() for kind in KINDS)).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize("kind", [*SHAPES, "blur"])
def test_shapes_scale_with_the_picture(kind: str) -> None:
    large = scene(6, (896, 720))
    small = large.resize((448, 360), Image.Resampling.BOX)
    corruption = Corruption(kind, 3)
    shrunk = corruption(large, "a").resize(small.size, Image.Resampling.BOX)
    assert psnr(shrunk, corruption(small, "a")) > 28
    assert changed(shrunk, corruption(small, "a")) < 0.15 * changed(small, corruption(small, "a"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (3, 40), (2800, 28), (28, 2800), (1920, 1080)])
def test_any_size_is_kept(kind: str, size: tuple[int, int]) -> None:
    image = noise_image(*size, seed=1)
    found = Corruption(kind, 5)(image, "a")
    assert (found.mode, found.size) == ("RGB", size)
    assert changed(image, found) > 0 or size == (1, 1) or (kind == "blur" and min(size) < 28)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", ["black", "white"])
def test_pictures_of_one_colour_break_nothing(kind: str, colour: str) -> None:
    image = Image.new("RGB", (64, 48), colour)
    found = Corruption(kind, 5)(image, "a")
    assert found.size == image.size
    if colour == "black" and kind != "noise":
        assert changed(image, found) < 6


# ---- each is what its name says -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_the_black_around_a_view_stays_black(kind: str) -> None:
    image = scene(8)
    around = pixels(image).max(2) < 8
    rows, columns = np.indices(around.shape)
    centre = np.array(around.shape) / 2
    outside = around & (np.hypot(rows - centre[0], columns - centre[1]) > 0.62 * min(around.shape))
    assert outside.mean() > 0.02
    assert pixels(Corruption(kind, 5)(image, "a"))[outside].max() < 24


def test_smoke_is_grey_and_hides_contrast_by_its_depth() -> None:
    rng = np.random.default_rng(0)
    coarse = np.repeat(np.repeat(rng.integers(60, 200, (48, 48, 1)), 8, 0), 8, 1)
    image = Image.fromarray(np.broadcast_to(coarse, (384, 384, 3)).astype(np.uint8).copy())
    noisy = [pixels(Corruption("smoke", level)(image, "a")) for level in LEVELS]
    for depth, seen in zip(corrupt.SMOKE, noisy, strict=True):
        left = (
            np.diff(seen[4::8, 4::8, 1], axis=1).std() / np.diff(pixels(image)[4::8, 4::8, 1], axis=1).std()
        )
        assert np.exp(-depth) * 0.9 < left < np.exp(-0.6 * depth)  # more is seen between the clouds
    assert np.ptp(noisy[-1], axis=2).mean() < 12


def covered(kind: str, level: int, by: float) -> tuple[float, NDArray[np.bool_], Image.Image]:
    image = Image.new("RGB", (400, 400), (190, 140, 130))
    found = Corruption(kind, level)(image, "c")
    mask = np.abs(pixels(found) - pixels(image)).max(2) > by
    return float(mask.mean()), mask, found


@pytest.mark.parametrize("level", LEVELS)
def test_blood_covers_its_share_in_dark_red_and_is_seen_through(level: int) -> None:
    share, mask, found = covered("blood", level, 6)
    assert share == pytest.approx(corrupt.BLOOD[level - 1] * 13 / 12, rel=0.2)
    red, green, blue = pixels(found)[mask].T
    assert (red - np.maximum(green, blue)).mean() > 50
    assert red.mean() < 160
    assert len(np.unique(green)) > 40  # from thin to thick, not one colour


@pytest.mark.parametrize("level", LEVELS)
def test_highlights_cover_their_share_and_are_white(level: int) -> None:
    share, mask, found = covered("specular", level, 60)
    assert share == pytest.approx(corrupt.SPECULAR[level - 1], rel=0.35)
    assert pixels(found)[mask].min(1).mean() > 215


def test_highlights_are_small_and_fall_where_it_is_bright() -> None:
    image = Image.new("RGB", (400, 400), (60, 20, 20))
    image.paste((200, 120, 110), (0, 0, 200, 400))
    lit = np.abs(pixels(Corruption("specular", 4)(image, "a")) - pixels(image)).max(2) > 60
    assert lit[:, :190].sum() > 4 * lit[:, 210:].sum()
    # None is as wide as 8 % of the side.
    eroded = lit.copy()
    for _ in range(16):
        inner = (
            eroded[1:-1, 1:-1] & eroded[:-2, 1:-1] & eroded[2:, 1:-1] & eroded[1:-1, :-2] & eroded[1:-1, 2:]
        )
        eroded = np.pad(inner, 1)
    assert not eroded.any()


@pytest.mark.parametrize("level", LEVELS)
def test_noise_and_darkness_have_their_figures(level: int) -> None:
    grey = Image.new("RGB", (300, 300), (128, 128, 128))
    noise = pixels(Corruption("noise", level)(grey, "a")) / 255
    expected = np.clip(np.random.default_rng(0).normal(128 / 255, corrupt.NOISE[level - 1], 10**6), 0, 1)
    assert noise.std() == pytest.approx(expected.std(), rel=0.02)
    dark = pixels(Corruption("dark", level)(grey, "a")) / 255
    bright = corrupt.DARK[level - 1] * 128 / 255
    assert dark.mean() == pytest.approx(bright, abs=0.01)
    spread = np.sqrt(bright / corrupt.PHOTONS[level - 1] + (corrupt.NOISE[level - 1] / 10) ** 2)
    assert dark.std() == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize("level", LEVELS)
def test_blur_is_a_gaussian_for_224_pixels(level: int) -> None:
    """An edge becomes the integral of the Gaussian: 84 % one standard deviation away."""
    for side in (224, 672):
        image = Image.new("RGB", (side, side), "black")
        image.paste("white", (side // 2, 0, side, side))
        row = pixels(Corruption("blur", level)(image, "a"))[side // 2, :, 0] / 255
        one = np.interp(0.8413, row, np.arange(side)) - np.interp(0.5, row, np.arange(side))
        assert one == pytest.approx(corrupt.BLUR[level - 1] * side / 224, rel=0.1, abs=0.35)


# ---- names --------------------------------------------------------------------------------------------


def test_names_are_read() -> None:
    assert parse("smoke:3") == [Corruption("smoke", 3)]
    assert parse(" jpeg : 2..4 ") == [Corruption("jpeg", level) for level in (2, 3, 4)]
    assert parse("dark") == parse("dark:1..5") == [Corruption("dark", level) for level in LEVELS]
    for kind in KINDS:
        assert [parse(each.name) for each in parse(kind)] == [[each] for each in parse(kind)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smok:3", 'no kind is called "smok", did you mean "smoke"?'),
        ("Blood:1", 'did you mean "blood"?'),
        ("specularity", 'did you mean "specular"?'),
        ("fog", f'no kind is called "fog": kinds are {", ".join(KINDS)}, levels 1 to 5'),
        ("", 'no kind is called ""'),
        (":3", 'no kind is called ""'),
        ("smoke:", "write smoke:3, or smoke:1..5 for several"),
        ("smoke:0", "not a level"),
        ("smoke:6", "not a level"),
        ("smoke:4..2", "not a level"),
        ("smoke:1-5", "smoke:1..5 for several"),
        ("smoke:٣", "not a level"),
    ],
)
def test_a_name_that_is_none_says_what_is_meant(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        parse(text)


def test_there_is_no_other_corruption() -> None:
    for kind, level in (("fog", 1), ("smoke", 0), ("smoke", 6)):
        with pytest.raises(ValueError, match="kinds are smoke"):
            Corruption(kind, level)


def test_the_page_tells_the_levels() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for kind in KINDS:
        levels = ", ".join(map(str, getattr(corrupt, kind.upper())))
        assert re.search(rf"^\| `{kind}` \|.*\| {re.escape(levels)} \|$", page, re.MULTILINE), kind
