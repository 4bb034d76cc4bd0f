"""Procedural endoscopy scenes with questions: a data set that needs no download.

A scene is a handful of facts (instruments, polyps, bleeding, mucosa, view), drawn from (seed, index). Its
picture and its questions are both made from those facts, so every answer is right by construction:

    (seed, index) ──▶ Scene ──┬─▶ render    ──▶ RGB picture
                              └─▶ questions ──▶ five to nine rows of questions.jsonl

Bytes are the same on every run: every scene has random streams (PCG64) of its own, and pictures are made with
sums, products, quotients and square roots, which IEEE 754 rounds the same way everywhere.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

Part = Literal["train", "val", "test"]
Array = npt.NDArray[np.float32]
T = TypeVar("T")

IMAGES = 1800
CASE = 4
"""Consecutive pictures of one procedure: they share mucosa and picture size and lie in one split."""

VIEW_RADIUS = 0.60
"""Of the round view, in units of the shorter side: a little of it is cut off, as on most monitors."""
SIZES = ((320, 256), (360, 288), (320, 288), (400, 320), (384, 288), (352, 320), (320, 320), (288, 320))
QUADRANTS = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}

RGB = tuple[float, float, float]
MUCOSA: dict[str, RGB] = {
    "pink": (0.87, 0.55, 0.52),
    "orange": (0.88, 0.60, 0.26),
    "pale": (0.89, 0.79, 0.69),
}
POLYP: dict[str, RGB] = {"white": (0.97, 0.90, 0.80), "brown": (0.36, 0.22, 0.14)}
SHAFT: dict[str, RGB] = {"black": (0.11, 0.11, 0.13), "blue": (0.10, 0.28, 0.72), "green": (0.10, 0.55, 0.30)}
TIP: dict[str, RGB] = {
    "grasper": (0.70, 0.76, 0.84),
    "scissors": (0.20, 0.17, 0.24),
    "hook": (0.97, 0.97, 0.95),
}
TOOL = np.float32(1.25)
"""Scale of the instruments."""
COPPER: RGB = (0.72, 0.40, 0.12)
BLOOD: RGB = (0.58, 0.01, 0.03)


@dataclass(frozen=True)
class Instrument:
    """A tool that enters from one side; the tip's place is in units of the view's radius, y downwards."""

    kind: str
    shaft: str
    side: str
    tip: tuple[float, float]
    jaws: Literal["open", "closed"] | None  # a hook has none


@dataclass(frozen=True)
class Spot:
    """A polyp or a pool of blood: centre and radius in units of the view's radius."""

    x: float
    y: float
    radius: float
    quadrant: str


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about one picture."""

    seed: int
    index: int
    size: tuple[int, int]  # width, height in pixels
    mucosa: str
    view: Literal["clear", "smoky", "dark"]
    instruments: tuple[Instrument, ...]
    polyps: tuple[Spot, ...]
    polyp_colour: str
    blood: Spot | None


@dataclass(frozen=True)
class Question:
    """One row of questions.jsonl, without what it shares with its picture."""

    question: str
    answer: str
    question_type: str


def sample_scene(seed: int, index: int) -> Scene:
    """Draw the facts of picture `index`; pictures are independent but for what their case shares."""
    case = _stream(seed, 0, index // CASE)
    size = SIZES[case.integers(len(SIZES))]
    mucosa = _pick(case, {"pink": 0.52, "orange": 0.28, "pale": 0.20})

    rng = _stream(seed, 1, index)
    view: Literal["clear", "smoky", "dark"] = _pick(rng, {"clear": 0.54, "smoky": 0.26, "dark": 0.20})
    sides = {"right": 0.46, "left": 0.28, "bottom": 0.16, "top": 0.10}
    kinds = {"grasper": 0.50, "scissors": 0.28, "hook": 0.22}
    instruments: list[Instrument] = []
    for _ in range(_pick(rng, {0: 0.21, 1: 0.56, 2: 0.23})):
        side, kind = _pick(rng, sides), _pick(rng, kinds)
        del sides[side], kinds[kind]
        shaft = _pick(rng, {"black": 0.50, "blue": 0.30, "green": 0.20})
        jaws: Literal["open", "closed"] = _pick(rng, {"open": 0.55, "closed": 0.45})
        reach, across = rng.uniform(-0.08, 0.08), rng.uniform(-0.14, 0.14)
        x, y = SIDES[side]
        tip = (x * reach + y * across, y * reach + x * across)
        instruments.append(Instrument(kind, shaft, side, tip, None if kind == "hook" else jaws))

    # One quadrant each, so that nothing hides anything else of its sort.
    free = {"lower right": 0.40, "lower left": 0.25, "upper left": 0.20, "upper right": 0.15}
    blood = None
    if rng.random() < 0.46:
        blood = _spot(rng, free, 0.30, 0.37)
    count = _pick(rng, {0: 0.42, 1: 0.31, 2: 0.18, 3: 0.09})
    polyps = tuple(_spot(rng, free, 0.22, 0.28) for _ in range(count))
    polyp_colour = _pick(rng, {"white": 0.56, "brown": 0.44})
    return Scene(seed, index, size, mucosa, view, tuple(instruments), polyps, polyp_colour, blood)


def questions(scene: Scene) -> list[Question]:
    """Five to nine of the questions that make sense for the scene, in random order."""
    tools, polyps = scene.instruments, scene.polyps
    every = [
        Question("Is there bleeding?", _yes(scene.blood is not None), "yes_no"),
        Question("Is a grasper in view?", _yes(any(tool.kind == "grasper" for tool in tools)), "yes_no"),
        Question("Is a polyp visible?", _yes(bool(polyps)), "yes_no"),
        Question("How many polyps are visible?", str(len(polyps)), "count"),
        Question("How many instruments are in view?", str(len(tools)), "count"),
        Question("What colour is the mucosa?", scene.mucosa, "colour"),
        Question("Is the view clear, smoky or dark?", scene.view, "state"),
    ]
    if len(tools) == 1:
        tool = tools[0]
        every += [
            Question("Which instrument is in view: grasper, scissors or hook?", tool.kind, "which"),
            Question("From which side does the instrument enter?", tool.side, "where"),
            Question("What colour is the shaft of the instrument?", tool.shaft, "colour"),
        ]
        if tool.jaws is not None:
            every.append(Question("Are the jaws open or closed?", tool.jaws, "state"))
    if len(polyps) == 1:
        every.append(Question("Where is the polyp?", polyps[0].quadrant, "where"))
    if polyps:
        every.append(Question("What colour is the polyp tissue?", scene.polyp_colour, "colour"))
    if scene.blood is not None:
        every.append(Question("Where is the bleeding?", scene.blood.quadrant, "where"))
    rng = _stream(scene.seed, 2, scene.index)
    count = min(len(every), int(rng.integers(5, 10)))
    return [every[i] for i in rng.permutation(len(every))[:count]]


def split_of(index: int) -> Part:
    """By case, hence by image: of every twelve cases, ten train, one validates and one tests."""
    position = index // CASE % 12
    return "val" if position == 5 else "test" if position == 11 else "train"


def render(scene: Scene) -> Image.Image:
    """The picture: mucosa, then polyps, blood and instruments, then light, smoke, lens and noise."""
    width, height = scene.size
    rng = _stream(scene.seed, 3, scene.index)
    radius = np.float32(VIEW_RADIUS * min(width, height))
    x, y = np.meshgrid(
        (np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)) / radius,
        (np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)) / radius,
    )
    soft = np.float32(1.6) / radius  # edge width: about one and a half pixels
    texture = _texture(scene.seed)
    picture = _mucosa(rng, scene, x, y, texture)
    for polyp in scene.polyps:
        _draw_polyp(rng, picture, x, y, polyp, POLYP[scene.polyp_colour], soft)
    if scene.blood is not None:
        _draw_blood(rng, picture, x, y, scene.blood, texture)
    for tool in scene.instruments:
        _draw_instrument(rng, picture, x, y, tool, soft)

    # Light falls off from the lamp, which sits a little off the axis.
    lamp_x, lamp_y = rng.uniform(-0.2, 0.2, 2).astype(np.float32)
    distance = (x - lamp_x) ** 2 + (y - lamp_y) ** 2
    light = np.float32(1.08) / (1 + np.float32(0.30) * distance)
    if scene.view == "dark":
        light *= np.float32(rng.uniform(0.40, 0.48))
    picture *= light[..., None]
    if scene.view == "smoky":
        cloud = _crop(rng, texture[0], height, width)
        haze = np.float32(rng.uniform(0.36, 0.46)) + np.float32(0.25) * (cloud - np.float32(0.5))
        picture += (np.array((0.80, 0.82, 0.85), np.float32) - picture) * haze[..., None]
    picture += np.float32(0.05) * (_crop(rng, texture[2], height, width) - np.float32(0.5))[..., None]
    picture *= _inside(x * x + y * y - np.float32(1), np.float32(0.04))[..., None]
    pixels = np.clip(picture * 255 + np.float32(0.5), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels, "RGB")


def write_demo(folder: Path, *, seed: int = 7, images: int = IMAGES) -> Path:
    """Write `images/*.jpg` and `questions.jsonl` to a folder and return the path of the latter.

    The listing appears only when everything else is there; a folder that has one is left as it is.
    """
    folder = Path(folder)
    listing = folder / "questions.jsonl"
    if listing.exists():
        return listing
    with staged(folder, last=listing.name) as staging:
        (staging / "images").mkdir()
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # numpy and Pillow release the lock
            list(pool.map(partial(_save, seed, staging), range(images)))
        lines = [json.dumps(row) + "\n" for index in range(images) for row in rows(seed, index)]
        (staging / listing.name).write_text("".join(lines), encoding="utf-8", newline="\n")
    return listing


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into that becomes `folder` in one rename once the block ends without an error.

    Where `folder` already holds something, the files are moved into it one by one instead, `last` at the end.
    Nothing is ever deleted, and processes that write the same bytes at once do not disturb each other.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        staging = Path(scratch) / folder.name
        staging.mkdir()
        yield staging
        try:
            staging.replace(folder)
        except OSError:
            files = [path for path in staging.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == last):
                target = folder / path.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)


def rows(seed: int, index: int) -> list[dict[str, str]]:
    """The lines of questions.jsonl that belong to one picture."""
    return [
        {
            "id": f"{index:05d}-{number}",
            "image": f"images/{index:05d}.jpg",
            "question": question.question,
            "answer": question.answer,
            "question_type": question.question_type,
            "group": f"case{index // CASE:04d}",
            "split": split_of(index),
        }
        for number, question in enumerate(questions(sample_scene(seed, index)))
    ]


def _save(seed: int, folder: Path, index: int) -> None:
    render(sample_scene(seed, index)).save(folder / "images" / f"{index:05d}.jpg", quality=90)


def _stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Random numbers of their own for every purpose (case, facts, questions, picture) and index."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, purpose, index))))


def _pick(rng: np.random.Generator, weights: dict[T, float]) -> T:
    """One key, with probability proportional to its weight."""
    left = rng.random() * math.fsum(weights.values())
    for key, weight in weights.items():
        left -= weight
        if left < 0:
            return key
    return key


def _spot(rng: np.random.Generator, free: dict[str, float], low: float, high: float) -> Spot:
    """A spot of radius low..high in a free quadrant, which it takes."""
    quadrant = _pick(rng, free)
    del free[quadrant]
    x, y = QUADRANTS[quadrant]
    return Spot(x * rng.uniform(0.42, 0.52), y * rng.uniform(0.40, 0.48), rng.uniform(low, high), quadrant)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


# Parts of a picture: each changes `picture`, (height, width, 3) in 0..1, in place; coordinates in view radii.


@lru_cache(maxsize=1)
def _texture(seed: int) -> tuple[Array, Array, Array]:
    """Three 1024 x 1024 maps in 0..1 that pictures take their crops from: clouds, vessels and grain."""
    rng = _stream(seed, 4, 0)

    def noise(cells: int) -> Array:
        grid = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
        smooth = Image.fromarray(grid, "L").resize((1024, 1024), Image.Resampling.BICUBIC)
        return np.asarray(smooth, dtype=np.float32) / np.float32(255)

    clouds = (noise(8) * 4 + noise(16) * 2 + noise(32)) / np.float32(7)
    # Vessels run along the level line of a smooth map: thin, branching and closed, as vessels look.
    ridge = np.abs((noise(16) * 3 + noise(40)) / np.float32(4) - np.float32(0.5))
    fine = np.abs((noise(36) * 2 + noise(90)) / np.float32(3) - np.float32(0.5))
    trunks = np.clip(1 - ridge * np.float32(22), 0, 1)
    twigs = np.clip(1 - fine * np.float32(18), 0, 1) * np.float32(0.6)
    vessels = np.maximum(trunks, twigs) * np.clip(clouds * np.float32(2.4) - np.float32(0.5), 0, 1)
    return clouds, vessels.astype(np.float32), (noise(512) + noise(256)) / np.float32(2)


def _crop(rng: np.random.Generator, texture: Array, height: int, width: int) -> Array:
    top, left = rng.integers(0, 1024 - height), rng.integers(0, 1024 - width)
    return texture[top : top + height, left : left + width]


def _inside(signed: Array, soft: np.float32 | float) -> Array:
    """1 where `signed` < -soft, 0 where it is > soft, smooth between (3t² - 2t³)."""
    t = np.clip((np.float32(soft) - signed) / np.float32(2 * soft), 0, 1)
    smooth: Array = t * t * (3 - 2 * t)
    return smooth


def _blend(picture: Array, colour: npt.ArrayLike, mask: Array) -> None:
    picture += (np.asarray(colour, np.float32) - picture) * mask[..., None]


def _window(x: Array, y: Array, cx: float, cy: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns within `reach` of a point, so that small things cost little."""
    columns = np.flatnonzero(np.abs(x[0] - np.float32(cx)) < reach)
    lines = np.flatnonzero(np.abs(y[:, 0] - np.float32(cy)) < reach)
    return slice(int(lines[0]), int(lines[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _around(x: Array, y: Array, spot: Spot) -> tuple[Array, Array]:
    """Coordinates with the spot's centre at 0 and its edge at 1."""
    radius = np.float32(spot.radius)
    return (x - np.float32(spot.x)) / radius, (y - np.float32(spot.y)) / radius


def _mucosa(rng: np.random.Generator, scene: Scene, x: Array, y: Array, texture: tuple[Array, ...]) -> Array:
    """Tissue with vessels, uneven tone, and for most scenes the dark lumen with a few folds around it."""
    clouds, vessels, _ = texture
    height, width = x.shape
    tone = np.asarray(MUCOSA[scene.mucosa], np.float32) * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    uneven = np.float32(0.72) + np.float32(0.56) * _crop(rng, clouds, height, width)
    veins = _crop(rng, vessels, height, width) * np.float32(rng.uniform(0.25, 0.45))
    picture = np.empty((height, width, 3), np.float32)
    for channel, fade in enumerate((0.45, 0.85, 0.75)):  # vessels darken green and blue most, as blood does
        picture[..., channel] = tone[channel] * uneven * (1 - np.float32(fade) * veins)
    lumen_x, lumen_y = rng.uniform(-0.15, 0.15, 2).astype(np.float32)
    squash = np.float32(rng.uniform(0.8, 1.25))
    wobble = np.float32(0.25) * (_crop(rng, clouds, height, width) - np.float32(0.5))
    far = np.sqrt((x - lumen_x) ** 2 * squash + (y - lumen_y) ** 2 / squash) + wobble
    depth = np.float32(rng.uniform(0.0, 0.6)) * _inside(far - np.float32(0.16), 0.14)
    for ring in (0.42, 0.66, 0.92):
        fold = np.abs(far - np.float32(ring + rng.uniform(-0.05, 0.05)))
        depth += np.float32(rng.uniform(0.05, 0.2)) * np.clip(1 - fold * np.float32(14), 0, 1)
    picture *= (1 - depth)[..., None]
    return picture


def _draw_polyp(
    rng: np.random.Generator, picture: Array, x: Array, y: Array, polyp: Spot, colour: RGB, soft: np.float32
) -> None:
    """A dome: shadow around its foot, brighter towards the lamp, one wet highlight."""
    at = _window(x, y, polyp.x, polyp.y, polyp.radius * 1.7)
    dx, dy = _around(x[at], y[at], polyp)
    angle = np.float32(rng.uniform(-0.5, 0.5))
    stretch = np.float32(rng.uniform(0.86, 1.16))
    far = np.sqrt((dx + angle * dy) ** 2 * stretch + dy**2 / stretch)
    local = picture[at]
    local *= (1 - np.float32(0.55) * _inside(far - np.float32(1.12), 0.35))[..., None]
    dome = np.sqrt(np.clip(1 - far * far, 0, 1))
    tilt = np.float32(0.16) * (dx * np.float32(-polyp.x) + dy * np.float32(-polyp.y))
    shade = np.float32(0.62) + np.float32(0.46) * dome + tilt
    pits = np.float32(1) - np.float32(0.12) * rng.random(dome.shape, dtype=np.float32)
    body = np.asarray(colour, np.float32) * (shade * pits)[..., None]
    _blend(local, body, _inside(far - np.float32(1), soft / np.float32(polyp.radius)))
    gleam = np.sqrt((dx + np.float32(0.5 * polyp.x)) ** 2 + (dy + np.float32(0.5 * polyp.y)) ** 2)
    _blend(local, (1.0, 1.0, 1.0), np.float32(0.8) * _inside(gleam - np.float32(0.16), 0.12))


def _draw_blood(
    rng: np.random.Generator, picture: Array, x: Array, y: Array, pool: Spot, texture: tuple[Array, ...]
) -> None:
    """A dark red pool of ragged outline that runs down a little, with gleams on its wet surface."""
    clouds, _, grain = texture
    at = _window(x, y, pool.x, pool.y + 0.1, pool.radius * 1.9)
    dx, dy = _around(x[at], y[at], pool)
    ragged = np.float32(1.3) * (_crop(rng, clouds, *dx.shape) - np.float32(0.5))
    ragged += np.float32(0.35) * (_crop(rng, grain, *dx.shape) - np.float32(0.5))
    round_part = np.sqrt(dx * dx + dy * dy)
    run = np.float32(rng.uniform(-0.4, 0.4))
    trickle = np.maximum(np.abs(dx - run) * 4, np.abs(dy - np.float32(0.75)))
    far = np.minimum(round_part, trickle) + ragged
    mask = _inside(far - np.float32(0.95), 0.14)
    depth = np.float32(0.75) + np.float32(0.5) * _crop(rng, clouds, *dx.shape)
    _blend(picture[at], np.asarray(BLOOD, np.float32) * depth[..., None], np.float32(0.96) * mask)
    gleam = np.clip(_crop(rng, grain, *dx.shape) * np.float32(9) - np.float32(7.2), 0, 1)
    _blend(picture[at], (0.95, 0.75, 0.72), np.float32(0.6) * mask * gleam)


def _box(along: Array, across: Array, middle: float, beside: float, half: float, width: float) -> Array:
    """Signed distance (by the larger coordinate) to a rectangle around (middle, beside)."""
    long = np.abs(along - np.float32(middle)) - np.float32(half)
    signed: Array = np.maximum(np.abs(across - np.float32(beside)) - np.float32(width), long)
    return signed


def _draw_instrument(
    rng: np.random.Generator, picture: Array, x: Array, y: Array, tool: Instrument, soft: np.float32
) -> None:
    """Shaft, collar and tip, lit as a cylinder: `along` runs from the tip out of the view, `across` it."""
    side_x, side_y = SIDES[tool.side]
    lean = rng.uniform(-0.18, 0.18)
    length = math.sqrt(1 + lean * lean)
    ax, ay = np.float32((side_x - lean * side_y) / length), np.float32((side_y + lean * side_x) / length)
    dx, dy = (x - np.float32(tool.tip[0])) / TOOL, (y - np.float32(tool.tip[1])) / TOOL
    along, across = dx * ax + dy * ay, dy * ax - dx * ay

    neck = np.float32(0.40)
    parts: list[tuple[Array, RGB]] = []  # signed distance to the outline (negative inside) and colour
    metal = TIP[tool.kind]
    if tool.kind == "hook":
        rod = _box(along, across, 0.20, 0.0, 0.20, 0.045)
        heel = _box(along, across, 0.03, 0.11, 0.045, 0.13)
        sleeve = _box(along, across, 0.31, 0.0, 0.13, 0.10)
        parts += [(np.minimum(rod, heel), COPPER), (sleeve, metal)]
    else:
        opening = 0.46 if tool.jaws == "open" else 0.0
        size = math.sqrt(1 + opening * opening)
        for sign in (-1, 1):
            # Each jaw in its own frame: `run` from the hinge to its end, `off` beside it.
            run = ((neck - along) + np.float32(sign * opening) * across) / np.float32(size)
            off = (across - np.float32(sign * opening) * (neck - along)) / np.float32(size) * sign
            if tool.kind == "grasper":
                teeth = np.float32(0.022) * (np.abs((run * 16) % 1 - np.float32(0.5)) * 2)
                body = np.maximum(
                    np.abs(off - np.float32(0.05)) - np.float32(0.065) + teeth, run - np.float32(0.40)
                )
            else:
                taper = np.float32(0.07) * np.clip(1 - run / np.float32(0.46), 0, 1)
                body = np.maximum(np.abs(off - np.float32(0.012)) - taper, run - np.float32(0.46))
            parts.append((np.maximum(body, -run - np.float32(0.05)), metal))
    ring = _box(along, across, 0.44, 0.0, 0.06, 0.12)
    tube = np.maximum(np.abs(across) - np.float32(0.13), np.float32(0.49) - along)
    parts += [(ring, metal), (tube, SHAFT[tool.shaft])]

    outline = parts[0][0]
    for signed, _ in parts[1:]:
        outline = np.minimum(outline, signed)
    picture *= (1 - np.float32(0.5) * _inside(outline - np.float32(0.03), 0.06))[..., None]  # shadow
    round_light = np.clip(1 - (across / np.float32(0.15)) ** 2, 0, 1)
    streak = np.clip(1 - np.abs(across + np.float32(0.045)) * np.float32(30), 0, 1)
    for signed, colour in parts:
        lit = np.asarray(colour, np.float32) * (np.float32(0.5) + np.float32(0.6) * round_light)[..., None]
        lit += (np.float32(0.3) * streak)[..., None]
        _blend(picture, lit, _inside(signed, soft))
