"""Runs and answers as matplotlib figures, for notebooks and papers.

Each function returns a new `matplotlib.figure.Figure` of its own: nothing is shown, no backend chosen, and
pyplot knows nothing of it. In a notebook `%matplotlib inline` has the last one of a cell drawn. Needs
matplotlib: `pip install 'surgvqa[notebook]'`. Imports no torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgvqa.metrics import Prediction, normalise
from surgvqa.recipe import BadInput, printable
from surgvqa.results import Evaluation, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from surgvqa.predictor import Answer

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"
"""Okabe and Ito's, told apart without red and green."""

_LABELS = 20
"""Classes that a confusion matrix shows; the rarer ones are put together."""

_REST = "(other)"


def curves(run: Run) -> Figure:
    """Loss by step in nats per token, and exact match on the validation part beside its prior.

    The loss of each step is pale, its running mean over a fiftieth of the run in full colour. Raises
    BadInput where the run has neither.
    """
    import pandas as pd

    wanted = {"loss": (run.steps, "loss"), "exact": (run.validations, "exact match")}
    panels = [key for key, (rows, _) in wanted.items() if any(_number(row.get(key)) for row in rows)]
    if not panels:
        raise BadInput(f"{run.folder}: has no curves; only training writes them")
    figure = _figure(5.2 * len(panels), 3.4)
    for place, key in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        rows, label = wanted[key]
        x, y = _line(rows, key)
        if key == "loss":
            smooth = pd.Series(y).rolling(max(1, len(y) // 50), center=True, min_periods=1).mean()
            axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=0.8)
            axes.plot(x, smooth, color=BLUE, label="training")
            seen = _line(run.validations, "loss")
            if seen[0]:
                axes.plot(*seen, color=RED, marker="o", markersize=3, label="validation")
        else:
            axes.plot(x, y, color=BLUE, marker="o", markersize=3, label="model")
            guessed = _line(rows, "prior")
            if guessed[0]:
                axes.plot(*guessed, color=GREY, linestyle="--", label="prior, without the image")
            axes.set_ylim(0, 1)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)" if key == "loss" else label)
        axes.legend(frameon=False)
    return figure


def by_type(evaluation: Evaluation) -> Figure:
    """Exact match of the whole and of each question type in %: a dot, its 95 % interval, and the prior as a
    line across. Raises BadInput where there are no scores.
    """
    table = evaluation.scores_table()
    height = np.arange(len(table))[::-1]
    figure = _figure(7.0, 1.0 + 0.34 * len(table))
    axes = figure.add_subplot()
    axes.hlines(height, table["low"], table["high"], color=BLUE, linewidth=2, label="95 % interval")
    axes.plot(table["exact"], height, "o", color=BLUE, label="exact match")
    axes.plot(table["prior"], height, "|", color=ORANGE, markersize=14, markeredgewidth=3, label="prior")
    names = [
        f"{_short(str(name), 40)} ({n:,}{'*' if note else ''})"
        for name, n, note in zip(table.index, table["questions"], table["note"], strict=True)
    ]
    axes.set_yticks(height, labels=names, parse_math=False)
    axes.set(xlim=(-2, 102), xlabel="%" + "; * few questions or groups" * bool(table["note"].any()))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    return figure


def confusion(evaluation: Evaluation, question_type: str) -> Figure:
    """How often each reference (rows) got each answer (columns), for a question type.

    Numbers count questions, colours are shares of the row. Labels are normalised as for exact match; the
    20 most frequent of references have a row, all others share `(other)`, and so do answers that are none
    of these. Raises BadInput where no question has the type.
    """
    table = evaluation.table()
    chosen = table[table["type"] == question_type]
    if chosen.empty:
        known = ", ".join(sorted(set(table["type"])))
        raise BadInput(f"no question has the type {question_type!r}; there are {known}")
    truth, told = chosen["reference"].map(normalise), chosen["answer"].map(normalise)
    frequent = list(truth.value_counts().index[:_LABELS])
    labels = [*sorted(frequent), *([_REST] if {*truth, *told} - {*frequent} else [])]
    number = {label: place for place, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    rest = len(labels) - 1
    for one, other in zip(truth, told, strict=True):
        counts[number.get(one, rest), number.get(other, rest)] += 1
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.2 + 0.42 * len(labels)
    figure = _figure(side + 1.2, side)
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if share[row, column] > 0.6 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    names = [_short(label, 28) for label in labels]
    axes.set_xticks(range(len(labels)), labels=names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(labels)), labels=names, parse_math=False)
    axes.set(xlabel="answer", ylabel="reference")
    axes.set_title(f"{_short(question_type, 40)}, {len(chosen):,} questions", parse_math=False)
    return figure


def reliability(evaluation: Evaluation) -> Figure:
    """How often answers of a probability are right, and below it how many have it (bins of docs/metrics.md).

    Raises BadInput where answers have no probabilities: they must be chosen among labels.
    """
    overall = evaluation.scores.get("overall") or {}
    bins = overall.get("reliability")
    if not bins:
        raise BadInput(
            f"{evaluation.scores_file}: answers have no probabilities; with eval.answers=labels they have"
        )
    figure = _figure(4.4, 4.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = [row["from"] for row in bins], [row["to"] - row["from"] for row in bins]
    above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    above.bar(left, [row["exact"] for row in bins], width, align="edge", color=BLUE, alpha=0.35)
    above.plot([row["confidence"] for row in bins], [row["exact"] for row in bins], "o", color=BLUE)
    above.set(ylim=(0, 1), xlim=(0, 1), ylabel="share that is right", title=f"ECE {overall['ece']:.3f}")
    below.bar(left, [row["n"] for row in bins], width, align="edge", color=GREY)
    below.set(xlabel="probability of the answer", ylabel="questions")
    return figure


def answers(
    predictions: Sequence[Prediction], pictures: Sequence[Sequence[Image.Image]], *, columns: int = 4
) -> Figure:
    """Answered questions with their pictures: the answer's boxes in blue, expected ones in green.

    `pictures` has for each prediction the list that `Run.pictures` gives; of several the first is drawn.
    """
    columns = max(1, min(columns, len(predictions)))
    rows = -(-len(predictions) // columns)
    figure = _figure(3.4 * columns, 3.9 * max(1, rows))
    for place, (row, shown) in enumerate(zip(predictions, pictures, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        _draw(axes, shown[0], ((row.reference_regions, GREEN), (row.regions, BLUE)))
        frames = f" ({len(shown)} images)" if len(shown) > 1 else ""
        lines = [f"{row.question}{frames}", f"→ {row.answer or '(nothing)'}"]
        lines += [] if row.right else [f"expected: {' | '.join(row.references)}"]
        text = "\n".join(textwrap.fill(_short(line, 120), 42) for line in lines)
        axes.set_title(text, fontsize=8, loc="left", color=GREEN if row.right else RED, parse_math=False)
    return figure


def answer(picture: Image.Image, answer: Answer) -> Figure:
    """A picture with the boxes of an answer about it, the answer above, and beside it the probabilities of
    the ten most probable labels where it was chosen among some.
    """
    odds = sorted((answer.probabilities or {}).items(), key=lambda pair: -pair[1])[:10]
    figure = _figure(8.5 if odds else 5.0, 4.6)
    axes = figure.add_subplot(1, 2 if odds else 1, 1)
    boxes = [{"label": r.label, "box": r.box, "image": r.image} for r in answer.regions]
    _draw(axes, picture, ((boxes, BLUE),))
    lines = [answer.question, f"→ {answer.text or '(nothing)'}"]
    text = "\n".join(textwrap.fill(_short(line, 200), 52) for line in lines)
    axes.set_title(text, fontsize=10, loc="left", parse_math=False)
    if odds:
        bars = figure.add_subplot(1, 2, 2)
        height = np.arange(len(odds))[::-1]
        bars.barh(height, [share for _, share in odds], 0.6, color=BLUE)
        bars.set_ylim(min(-0.5, len(odds) - 5.5), len(odds) - 0.5)
        bars.set_yticks(height, labels=[_short(label, 28) for label, _ in odds], parse_math=False)
        bars.set(xlim=(0, 1), xlabel="probability")
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty one, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw(
    axes: Axes, picture: Image.Image, boxes: Iterable[tuple[Sequence[Mapping[str, Any]] | None, str]]
) -> None:
    """A picture, and the boxes in it (of the first image, in its pixels) in their colours."""
    from matplotlib.patches import Rectangle

    axes.imshow(np.asarray(picture), extent=(0, picture.width, picture.height, 0))
    axes.set_axis_off()
    axes.set_anchor("N")
    for regions, colour in boxes:
        for region in regions or ():
            if region["image"] == 0:
                x1, y1, x2, y2 = region["box"]
                axes.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2)
                )
                label = _short(region["label"], 30)
                axes.text(
                    x1, y1, label, color=colour, fontsize=8, va="bottom", clip_on=True, parse_math=False
                )


def _line(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have both."""
    kept = [(row["step"], row[key]) for row in rows if _number(row.get("step")) and _number(row.get(key))]
    return [step for step, _ in kept], [value for _, value in kept]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _short(text: str, most: int) -> str:
    """What data or a model wrote, in one line of at most so many characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 1]}…"
