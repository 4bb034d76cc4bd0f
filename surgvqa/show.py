"""What the model sees of one image and its questions: the canvas, and every token with its role.

surgvqa show RECIPE --index N ──▶ canvas-0.png …, tree.html, and the same in colours on the terminal
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image
from rich.text import Text

from surgvqa import grounding, letterbox, pictures
from surgvqa.augment import Augmented, Placement
from surgvqa.datasets import Example
from surgvqa.endings import writing_to
from surgvqa.plan import trees_of
from surgvqa.prepare import prepare
from surgvqa.recipe import BadInput, Part, Recipe
from surgvqa.terminal import Console
from surgvqa.tree import Questions, pack

STYLES = {"root": "cyan", "prompt": "yellow", "supervised": "bold green", "rest": "dim"}


@dataclass(frozen=True)
class Token:
    text: str
    id: int
    positions: tuple[int, int, int]
    """Temporal, row, column."""
    role: str
    """A key of STYLES; `rest` is what follows the answer's end of turn."""
    label: str = ""
    """What this token is trained to predict, if anything."""


@dataclass(frozen=True)
class Segment:
    title: str
    tokens: Sequence[Token]


def show(
    recipe: Recipe, part: Part, index: int, out: Path, console: Console, epoch: int | None = None
) -> None:
    """Write and print what the model sees of the `index`-th image of a part (from 0).

    With `epoch` (from 0) as training shows it then. Needs the model folder's small files, not its weights.
    Raises BadInput where there is no such image or epoch.
    """
    if epoch is not None and (recipe.image.augment == "none" or part != "train" or epoch < 0):
        raise BadInput(
            f"--epoch {epoch}: only the images of train differ by epoch, from 0 on, where the recipe has "
            "image.augment: endoscopy"
        )
    prepared = prepare(recipe, evaluated=None if part == "train" else [part])
    questions = prepared.questions(part)
    trees = trees_of(questions.image)
    if not trees:
        raise BadInput(f"--split {part}: holds no questions")
    if not 0 <= index < len(trees):
        raise BadInput(f"--index {index}: {part} has {len(trees)} images, 0 to {len(trees) - 1}")
    chosen = trees[index][: recipe.batch.questions_per_image]
    example = questions.examples[chosen[0]]
    factor = prepared.folder.factor
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
    facts = []
    placements = questions.placements(chosen[0], epoch)
    for number, (image, placement) in enumerate(zip(example.images, placements, strict=True)):
        canvas = prepared.canvases[image.key]
        file = out / f"canvas-{number}.png"
        drawn = placement.place(canvas.scale(letterbox.read_rgb(image)), recipe.image.fill)
        boxes = _outline(drawn, placement, [questions.examples[one] for one in chosen], number)
        with writing_to(file):
            drawn.save(file)
        facts.append(
            f"{image.key}: {canvas.source_width}×{canvas.source_height} → {canvas.width}×{canvas.height}, "
            f"{canvas.width // factor}×{canvas.height // factor} = {canvas.tokens(factor)} tokens; {file}"
            + (f"; drawn on it: {boxes}" if boxes else "")
        )
        if canvas.picture != (0, 0, *canvas.source_size):
            facts.append(
                f"cropped to x {canvas.picture[0]}…{canvas.picture[2]}, "
                f"y {canvas.picture[1]}…{canvas.picture[3]} of the image"
            )
        if isinstance(placement, Augmented):
            facts.append(f"epoch {epoch}: {placement.by}")
    segments = _segments(questions, chosen, epoch)
    page = out / "tree.html"
    with writing_to(page):
        page.write_text(
            _PAGE.render(facts=facts, images=len(example.images), segments=segments), encoding="utf-8"
        )
    for line in facts:
        console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)
    for segment in segments:
        console.print(segment.title, style="bold", markup=False, highlight=False)
        text = Text()
        for shown, run in _runs(segment.tokens):
            repeated = f"{shown}×{len(run)}" if len(run) > 3 else shown * len(run)
            text.append(repeated.replace("\n", "↵\n"), STYLES[run[0].role])
        console.print(text, soft_wrap=True)
    legend = Text("roles: ")
    for role, style in STYLES.items():
        legend.append(f" {role} ", style)
    console.print(legend)
    console.print(f"every token with its position and label: {page}", markup=False, soft_wrap=True)


def _outline(drawn: Image.Image, canvas: Placement, examples: Sequence[Example], number: int) -> str:
    """Draw the boxes in image `number` as the model is told them; returns how many have which colour."""
    counts: Counter[str] = Counter()
    for example in examples:
        boxes = [("asked", region, region.label) for region in example.asked_regions]
        words = "" if example.layout else example.answers[0]
        boxes += [("answered", region, region.label or words) for region in example.regions]
        for kind, region, label in boxes:
            if region.image == number:
                told = grounding.on_canvas(region, canvas).box
                pictures.outline(drawn, grounding.in_pixels(told, canvas), label, pictures.COLOURS[kind])
                counts[kind] += 1
    return ", ".join(f"{count} {kind} ({pictures.COLOURS[kind]})" for kind, count in counts.items())


def _segments(questions: Questions, chosen: Sequence[int], epoch: int | None) -> list[Segment]:
    """The tree as it is packed: read back from the tensors that a forward pass gets."""
    tree = questions.tree(chosen, epoch=epoch)
    packed = pack([tree])
    ids = packed.ids[0].tolist()
    texts = questions.chat.token_texts(ids)
    positions = [(int(t), int(h), int(w)) for t, h, w in packed.positions[:, 0].T.tolist()]
    kept = packed.keep.tolist()
    label = {
        kept[pick]: questions.chat.token_texts([target])[0]
        for pick, target in zip(packed.pick.tolist(), packed.targets.tolist(), strict=True)
    }
    supervised = {place + 1 for place in label}

    def tokens(start: int, end: int, role: str) -> list[Token]:
        made: list[Token] = []
        for place in range(start, end):
            if place in supervised:
                here = "supervised"
            else:
                here = role if not made or made[-1].role not in ("supervised", "rest") else "rest"
            made.append(Token(texts[place], ids[place], positions[place], here, label.get(place, "")))
        return made

    root_end = len(tree.root.ids)
    segments = [
        Segment(
            f"root, {root_end} tokens, positions 0…{tree.root.next_position - 1}", tokens(0, root_end, "root")
        )
    ]
    start = root_end
    for number, branch in zip(chosen, tree.branches, strict=True):
        end = start + len(branch.ids)
        example = questions.examples[number]
        title = (
            f"branch {example.id} ({example.question_type}), {len(branch.ids)} tokens, "
            f"positions {positions[start][0]}…{positions[end - 1][0]}"
        )
        segments.append(Segment(title, tokens(start, end, "prompt")))
        start = end
    return segments


def _runs(tokens: Sequence[Token]) -> list[tuple[str, list[Token]]]:
    """Runs of the same token, so that an image's many can be told as one."""
    return [(text, list(run)) for text, run in itertools.groupby(tokens, lambda token: token.text)]


_PAGES = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
_PAGES.filters["groups"] = _runs
_PAGE = _PAGES.from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src 'self'; style-src 'unsafe-inline'">
<title>What the model sees</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
img { max-width: 24rem; border: 1px solid #8888; margin-right: 1rem; }
.token { display: inline-block; border-radius: 4px; margin: 2px; padding: 1px 5px; font: 13px monospace;
         white-space: pre; vertical-align: top; }
.token small { display: block; opacity: .7; font-size: 10px; }
.root { background: #3aa5c840; } .prompt { background: #d9a40050; } .rest { background: #8883; }
.supervised { background: #2fa84f; color: #fff; font-weight: 600; }
</style>
<h1>What the model sees</h1>
{% for fact in facts %}<p>{{ fact }}</p>{% endfor %}
{% for number in range(images) %}<img src="canvas-{{ number }}.png" alt="canvas {{ number }}">{% endfor %}
<p><span class="token root">root</span><span class="token prompt">prompt</span>
<span class="token supervised">supervised</span><span class="token rest">after the answer</span>
Below each token: its id, its position (temporal, row, column), and → the token it is trained to predict.</p>
{% for segment in segments %}<h2>{{ segment.title }}</h2><div>
{%- for text, run in segment.tokens | groups -%}
{%- if run | length > 16 %}<details><summary>{{ run | length }} × {{ text }}</summary>{% endif -%}
{%- for token in run -%}
<span class="token {{ token.role }}">{{ token.text.replace("\\n", "↵") -}}
<small>{{ token.id }} @ {{ token.positions | join(",") }}
{%- if token.label %} → {{ token.label.replace("\\n", "↵") }}{% endif %}</small></span>
{%- endfor -%}
{%- if run | length > 16 %}</details>{% endif -%}
{%- endfor -%}
</div>{% endfor %}
</html>
"""
)
