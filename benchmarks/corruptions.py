"""Corrupted pictures: `python -m benchmarks.corruptions` times each kind, and draws a scene of the demo with
each kind at each level for docs/metrics.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.record import RESULTS, spread, write
from surgvqa.corrupt import KINDS, LEVELS, Corruption
from surgvqa.demo.scenes import render, sample_scene

SHEET = RESULTS.parents[1] / "docs" / "images" / "corruptions.webp"
SIZES = ((768, 768), (3840, 2160))
SCENE = 7, 278
"""Seed and number of the demo's scene that is shown."""


def sheet(tile: int = 160) -> Image.Image:
    """A row for each kind: the picture as it is, then each level; `tile` pixels high each."""
    picture = render(sample_scene(*SCENE))
    width, margin = round(picture.width * tile / picture.height), 64
    drawn = Image.new("RGB", (margin + width * (len(LEVELS) + 1), tile * len(KINDS)), "white")
    pen = ImageDraw.Draw(drawn)
    for row, kind in enumerate(KINDS):
        pen.text((4, tile * (row + 0.5)), kind, "black", ImageFont.load_default(14), anchor="lm")
        shown = [picture, *(Corruption(kind, level)(picture, "sheet") for level in LEVELS)]
        for column, each in enumerate(shown):
            place = margin + width * column, tile * row
            drawn.paste(each.resize((width, tile), Image.Resampling.LANCZOS), place)
    return drawn


def timed(kind: str, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Seconds of the processor."""
    picture = render(sample_scene(*SCENE)).resize(size, Image.Resampling.BICUBIC)
    corruption = Corruption(kind, 3)
    corruption(picture, "warm-up")
    seconds = []
    for number in range(rounds):
        start = time.process_time()
        corruption(picture, str(number))
        seconds.append(time.process_time() - start)
    return {"kind": kind, "width": size[0], "height": size[1], "seconds": spread(seconds)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.corruptions", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="the picture of all kinds and levels")
    given = parser.parse_args(argv)
    rows = []
    for size in SIZES:
        for kind in KINDS:
            rows.append(timed(kind, size, given.rounds))
            print(f"{kind:9} {size[0]}×{size[1]}: {rows[-1]['seconds']['median']:.3f} s", flush=True)
    sheet().save(given.sheet, quality=72, method=6)
    print(f"written: {write('corruptions', {'rounds': given.rounds}, rows, given.out)}, {given.sheet}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
