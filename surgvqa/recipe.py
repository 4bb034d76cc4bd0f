"""The recipe: what to train, on what, and how; never where.

A recipe is a YAML file of at most a few dozen lines, read strictly: an unknown key, a wrong type, a value
out of range or keys that contradict each other are all reported at once, before anything is loaded. The
dataclasses below are the reference of every key; `docs/recipe.md` is made from their docstrings.

    text ── YAML 1.2 ──▶ dict ── overrides a.b=c ──▶ dict ── validation ──▶ Recipe (frozen)
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

Part = Literal["train", "val", "test"]

Metric = Literal[
    "exact", "loss",
    "macro_precision", "macro_recall", "macro_f1", "balanced_accuracy", "ssg_map", "ssg_maf1", "ssg_wf1",
    "bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougeL", "meteor_stem", "cider",
    "ece", "auroc", "iou", "ap50",
]  # fmt: skip
"""What evaluation during training can be judged by: the validation loss, and the scores of surgvqa.scores."""

SMALLER_IS_BETTER = ("loss", "ece")
"""Of the metrics; of all others the larger value is the better."""

_TABLES = ("jsonl", "csv", "parquet", "json")

COLUMNS = frozenset(
    (
        "image", "question", "answer", "id", "question_type", "group", "split", "stage",
        "box", "boxes", "asked_box", "asked_boxes", "choices",
    )
)  # fmt: skip
"""Our names of the columns of tables."""

NEEDED = frozenset({"image", "images", "question", "answer", "conversations", "messages"})
"""Our names of the columns that a question must have."""

SEVERAL = frozenset({"image", "choices"})
"""Our names that may stand for several columns of a table."""

_TURNS = COLUMNS - {"question", "answer", "box", "boxes", "asked_box", "asked_boxes", "choices"}
MAPPED = {
    **dict.fromkeys((*_TABLES, "hub"), COLUMNS),
    "llava": _TURNS | {"conversations", "objects"},
    "messages": (_TURNS - {"image"}) | {"images", "messages", "objects"},
}
"""Formats whose columns may have other names → our names of those."""

VARIANTS = {
    "llava": ("marked", "boxes", "text"),
    "messages": ("marked", "boxes", "text"),
    **dict.fromkeys(_TABLES, ("text", "marked", "boxes")),
    "kvasir_vqa_x1": ("full", "medico"),
    "endovis18_vqa": ("classification", "sentence"),
    "cholec80_vqa": ("classification", "sentence"),
    "psi_ava_vqa": ("published", "with_actions"),
    "real_colon_vqa": ("short", "long"),
}
"""Formats that come in several forms, as `variant` names them; the first is read where it says nothing."""

_OF_CLIPS = ("real_colon_vqa", "surgvu25")


class BadInput(Exception):
    """Something a person must mend: `problems` holds every one found, each a full sentence with its place."""

    exit_code = 2

    def __init__(self, problems: Iterable[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[BadInput], tuple[list[str]]]:
        return type(self), (self.problems,)  # whole, also when told to another process


def explain(error: BadInput) -> int:
    """Print every problem to stderr, each on a line of its own; returns the exit code.

    All processes of a run find the same problems: only the main one lists them.
    """
    rank = os.environ.get("RANK", "0")
    problems = [printable(" ".join(problem.splitlines())) for problem in error.problems]
    if rank == "0":
        print(*problems, sep="\n", file=sys.stderr)
    else:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        print(f"[rank {rank}] stopped: {problems[0]}{more}", file=sys.stderr)
    return error.exit_code


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, ends a line, turns the direction of writing or cannot be encoded."""


def printable(text: str, keep: str = "") -> str:
    """The text with control characters, except those to `keep`, written as escapes.

    What comes from data, model folders or runs goes through here before a terminal gets it.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_LONGEST_NAME, _LONGEST_PATH = 255, 4000
"""Most bytes of a file's name, and of a folder's path that leaves room for files, on Linux and macOS."""


def expanded(path: str) -> str:
    """Return a path with a leading `~` or `~user`, and `$NAME` or `${NAME}` anywhere, replaced.

    Raises ValueError for an unknown user, an unset variable, and a path that is too long for a disk.
    """
    whole = path
    if "$" in path and not _there(path):  # a file whose name has a $ is taken as it is
        if missing := [a or b for a, b in _VARIABLE.findall(path) if not os.environ.get(a or b)]:
            raise ValueError(f"${missing[0]} is not set; set that variable, or write the path out")
        whole = _VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], path)
    if whole.startswith("~"):
        home = os.path.expanduser(whole)  # noqa: PTH111  # Path's raises where there is no such user
        if home == whole:
            user = whole.partition("/")[0]
            raise ValueError(f"{user} is no user's home folder; write ./{user} for a folder of that name")
        whole = home
    names = [name for name in re.split(r"[/\\]", whole) if len(os.fsencode(name)) > _LONGEST_NAME]
    if names or len(os.fsencode(whole)) > _LONGEST_PATH:
        raise ValueError(
            f"is too long for a path: {_shown(whole)}; a name has at most {_LONGEST_NAME} bytes, "
            f"a path {_LONGEST_PATH:,}"
        )
    return whole


def user_path(given: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with `expanded`. Raises BadInput if it cannot be a path."""
    try:
        return Path(_place(os.fspath(given)))
    except ValueError as error:
        raise BadInput(f"{_shown(os.fspath(given))}: {error}") from None


def path_argument(text: str) -> Path:
    """Return `user_path`, as the `type` of an argument for argparse."""
    try:
        return user_path(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_override(word: str) -> bool:
    """Return whether a word of a command is `key=value` rather than the name of a file."""
    return "=" in word and not _there(word)


def _there(path: str) -> bool:
    """Return whether a file or folder exists; False for a path that is too long or holds a NUL."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _place(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError(f"holds a control character: {value!a}")
    return expanded(value)


Place = Annotated[str, AfterValidator(_place)]
"""A path or a hub id; `~` and `$NAME` in it are replaced."""

Revision = Annotated[str, Field(pattern=r"^[\w./+@#=-]+$", max_length=_LONGEST_NAME)]
"""A branch, a tag or a commit."""

COUNT = 10**9
"""Upper bound of all counts: it fits into every library's integers, and no real run reaches it."""
SEED = 2**63 - 1
Stage = Annotated[int, Field(ge=-COUNT, le=COUNT)]
RATE = 1e37
"""Largest learning rate: AdamW's first step, up to ten times as long, is then still finite in fp32."""


def _number_or(value: object, least: int, *words: str) -> object:
    """Return one of the words, or a whole number from `least` to COUNT. Raises ValueError for other
    values."""
    if value in words or (type(value) is int and least <= value <= COUNT):
        return value
    raise ValueError(
        f"should be a whole number from {least} to {COUNT:,}, or {' or '.join(words)}, not {_shown(value)}"
    )


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Lora(_Section):
    rank: int = Field(16, ge=1, le=65536)
    """Rank of the update matrices."""
    alpha: float = Field(32, gt=0, le=1e6)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout probability on the adapter's input."""
    modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Linear layers to adapt. A plain name is looked for in the language model only; a name with a dot is
    a pattern for the whole path, e.g. `visual.blocks.*.attn.qkv`. One that matches nothing is an error."""


class Model(_Section):
    name: Place = Field(min_length=1)
    """Hub id, local folder, or `tiny-qwen2-vl` / `tiny-qwen3-vl` (random weights, for trying things out)."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub id; `null` is its main branch. A run records the commit at its start,
    and uses it when it resumes and in its evaluations."""
    tune: Literal["lora", "full"] = "lora"
    """`lora`: adapters on a frozen language model; `full`: all of the language model."""
    adapter: Place | None = None
    """A former run, or one of its checkpoints, whose trained weights a new run begins with: its adapters, or
    with `tune: full` its whole model. Of a run it is the best checkpoint, else the newest. `tune`, with
    `lora` what is adapted, and the content of the base model must be those of that run; all else begins
    anew."""
    train_vision: bool = False
    """Train the vision tower too (without its mergers)."""
    train_merger: bool = False
    """Train the merger(s) between vision tower and language model too."""
    lora: Lora = Lora()
    attn: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention over trees: `flex` (FlexAttention, CUDA only) or `sdpa`; `auto` takes flex on CUDA."""

    @field_validator("tune", mode="before")
    @classmethod
    def _known_tune(cls, value: object) -> object:
        if value == "qlora":
            raise ValueError("qlora is not available yet; use lora (frozen base in bf16) or full")
        return value


class Split(_Section):
    by: Literal["official", "image", "group", "frozen"] = "official"
    """`official`: the split that comes with the data (a corpus's own, or the `split` column or the files'
    names of a table); `image` or `group`: by a hash of the image or of the `group` column, so that no
    image or group is in two parts and adding rows moves none; `frozen`: as `surgvqa split` wrote it."""
    path: Place | None = None
    """The file of a `frozen` split."""
    val: float = Field(0.15, ge=0, lt=1)
    """Share of images or groups for validation (for `image` and `group`)."""
    test: float = Field(0.15, ge=0, lt=1)
    """Share of images or groups for the test (for `image` and `group`)."""
    seed: int = Field(42, ge=0, le=SEED)
    """Seed of the hash."""
    stratify: Literal["none", "question_type", "answer"] = "none"
    """Give each part its share of every question type, or of every answer within its type, as nearly as
    whole images or groups allow. Added rows may then move others: freeze such a split."""


class Source(_Section):
    format: Literal[
        "demo", "jsonl", "json", "csv", "parquet", "hub", "llava", "messages", "kvasir_vqa", "kvasir_vqa_x1",
        "endovis18_vqa", "endovis18_vqla", "endovis17_vqla", "cholec80_vqa", "surgicalgpt", "psi_ava_vqa",
        "ssg_vqa", "pitvqa", "real_colon_vqa", "surgvu25", "coco",
    ]  # fmt: skip
    """How the data is laid out: see docs/datasets.md."""
    path: Place | None = None
    """File, folder or hub id; relative paths start at the working folder. Only `demo` needs none."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub id."""
    roots: list[Place] = []
    """Further folders in which images may be; without any they must be inside the data's own folder."""
    columns: dict[str, str | list[str] | None] = {}
    """Our name of a column → the data's own, such as `{image: img_path, answer: label}`, for tables, hub data
    sets and conversations; a column that is not here has our name. null: the data has no such column, and a
    column with our name is ignored. `image` and `choices` of tables may be a list of columns."""
    list_answers: Literal["join", "alternatives"] | None = None
    """How an answer that is a list is used. `join`: its items, joined with `; `, are the answer.
    `alternatives`: each item is right, and the first is trained on. null: alternatives, with a warning."""
    group_pattern: str | None = None
    """Regular expression for the path of an image: what its parentheses match, joined by `/`, is the group of
    a row that has none, such as `(case_\\d+)`. For the formats that take `columns`."""
    variant: str | None = None
    """Which form of a corpus that comes in several: see docs/datasets.md; null: the first one named there. Of
    a hub data set: which subset."""
    boxes: Literal["auto", "pixels", "thousand", "share"] = "auto"
    """Unit of boxes in texts, columns and `objects`, for the formats that take `columns`: `pixels` of the
    image, `thousand` (0 to 1000 along each side) or `share` (0 to 1). `auto`: numbers up to 1 are shares.
    Other numbers are pixels in columns and `objects`; in texts the data must prove their unit."""
    frames: int | None = Field(None, ge=1, le=COUNT)
    """Most frames of a clip, evenly chosen, for formats with clips; null: all."""

    @field_validator("columns", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        for name, theirs in value.items() if isinstance(value, dict) else ():
            many = isinstance(theirs, list) and all(isinstance(column, str) for column in theirs)
            if not (theirs is None or isinstance(theirs, str) or many):
                raise ValueError(
                    f"{_shown(name)} is {_shown(theirs)}; give a column's name, a list of names, or null"
                )
        return value

    @field_validator("group_pattern")
    @classmethod
    def _with_parentheses(cls, value: str | None) -> str | None:
        try:
            groups = 1 if value is None else re.compile(value).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        if not groups:
            raise ValueError(f"{value!r} has no parentheses around what names the group")
        return value


class Data(Source):
    more: list[Source] = []
    """Further data sets to read with this one, each with the keys above of its own. Their questions and
    images get their number in front, `1/` or `1//`; a group of the same name in two is the same."""
    split: Split = Split()
    stages: list[Stage] | None = Field(None, min_length=1)
    """Train and evaluate on the questions of these stages alone; null: on all."""
    balance: Literal["none", "question_type", "answer"] = "none"
    """Draw the training questions of an epoch so that every question type, or every answer, comes equally
    often. An epoch keeps its length; no question comes again before all others of its class came."""
    labels: dict[str, list[str]] = {}
    """Question type → the closed set of its answers: `eval.answers: labels` chooses among them, and other
    answers in the data are reported. A type that is not here has its corpus's own set, where there is one."""
    on_error: Literal["fail", "skip"] = "fail"
    """What bad rows and images do: `fail` lists them all and ends; `skip` leaves them and the questions about
    them out of training and evaluation, and writes what and why to skipped.jsonl and how many into the
    scores."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Processes that read images ahead, per training process; null: chosen from the cores at hand."""

    @property
    def sources(self) -> list[Source]:
        """This data set and those that are read with it."""
        return [self, *self.more]

    @field_validator("stages")
    @classmethod
    def _once(cls, value: list[int] | None) -> list[int] | None:
        if value and len(set(value)) < len(value):
            raise ValueError(f"has one more than once: {_shown(value)}")
        return value

    @field_validator("labels")
    @classmethod
    def _closed_sets(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        sets = {kind: [label.strip() for label in labels] for kind, labels in value.items()}
        wrong = []
        for kind, labels in sets.items():
            if not labels:
                wrong.append(f"{kind} has none; list its answers or leave it out")
            elif "" in labels:
                wrong.append(f"{kind} has an empty one")
            elif twice := sorted({label for label in labels if labels.count(label) > 1}):
                wrong.append(f"{kind} has {', '.join(map(repr, twice))} more than once")
        if wrong:
            raise ValueError("; ".join(wrong))
        return sets


class Prompt(_Section):
    system: str | None = None
    """System message. null: that of the model's own chat template, which is `You are a helpful assistant.`
    for Qwen2-VL and none for Qwen3-VL."""
    instructions: dict[str, str] = {}
    """Question type → text put after the question, on a line of its own."""


class Image(_Section):
    mode: Literal["letterbox", "native"] = "letterbox"
    """`letterbox`: a square canvas, aspect kept, centred; `native`: aspect kept, no padding."""
    size: int | None = Field(None, ge=28, le=8192)
    """Side of the square in pixels (letterbox), snapped to the model's factor: 28 or 32."""
    max_tokens: int | None = Field(None, ge=1, le=COUNT)
    """Most image tokens (native); larger images are scaled down to fit, none is scaled up."""
    fill: str = "black"
    """Colour around a letterboxed or moved image: a CSS name or #rrggbb."""
    crop: Literal["none", "border"] = "none"
    """`border`: cut off the black around an endoscope's picture, found for each image; also in evaluation."""
    augment: Literal["none", "endoscopy"] = "none"
    """`endoscopy`: in training each epoch shows an image anew: cropped to 0.9 to 1 of its sides, turned by up
    to 10°, shifted by up to 0.1 of its sides, brightness, contrast and saturation changed by up to 0.2."""

    @field_validator("fill")
    @classmethod
    def _known_colour(cls, value: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a colour; use a CSS name such as black, or #rrggbb") from None
        return value


class Batch(_Section):
    questions: int = Field(64, ge=1, le=COUNT)
    """Questions per optimizer step, over all processes together."""
    questions_per_image: int = Field(8, ge=1, le=COUNT)
    """Most questions of one image in one group; 1 is the classical independent batch."""
    order: Literal["shuffled", "stages"] = "shuffled"
    """Of an epoch's questions: `shuffled`, or `stages`: those of the lowest stage first, then the next, each
    shuffled. The last step of a stage is filled with the first questions of the next."""
    tokens_per_micro_batch: int | Literal["auto"] = 8192
    """Most tokens in one forward pass of one process, or `auto`: as many as fit. Changes memory and speed,
    never the result; what does not fit into memory is halved before the first step."""
    trees: bool = True
    """Share each image among its questions; false gives one row per question, for comparison."""

    @field_validator("tokens_per_micro_batch", mode="before")
    @classmethod
    def _tokens_or_auto(cls, value: object) -> object:
        return _number_or(value, 16, "auto")


class Loss(_Section):
    per: Literal["token", "question"] = "token"
    """`token`: every answer token weighs the same; `question`: every answer weighs the same."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weigh questions by how rare their answer is in train: `inverse` of its count, or of the `effective`
    number (1 - b^n) / (1 - b) with b = 0.999 (Cui et al., CVPR 2019); the mean weight is 1."""


class Train(_Section):
    epochs: int = Field(3, ge=1, le=COUNT)
    """Passes over the training questions."""
    max_steps: int | None = Field(None, ge=1, le=COUNT)
    """Optimizer steps in all; when given, it decides instead of `epochs`."""
    lr: float = Field(2.0e-4, gt=0, le=RATE)
    """Peak learning rate of the language model or its adapters."""
    lr_vision: float | None = Field(None, gt=0, le=RATE)
    """Peak learning rate of the vision tower; null: `lr`."""
    lr_merger: float | None = Field(None, gt=0, le=RATE)
    """Peak learning rate of the mergers; null: `lr`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear fall towards 0, which the step after the last would have."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of all steps over which the learning rate rises to its peak, by equal amounts."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """AdamW's decay, on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e30)
    """Gradients longer than this are scaled down to it."""
    seed: int = Field(42, ge=0, le=SEED)
    """Seed of the order, of dropout and of new weights."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic; what trains is kept in fp32 either way."""
    checkpoint_layers: int | Literal["auto", "all"] = "auto"
    """How many decoder layers, the first, are recomputed in the backward pass to save memory, and with any
    of them the vision tower's blocks if it trains; `auto`: as few as must be."""
    max_hours: float | None = Field(None, gt=0, le=1e6)
    """Save and stop, as when asked by a signal, after so many hours of this start; null: never."""
    peer_timeout: float = Field(300, ge=5, le=1e6)
    """Seconds of silence after which another process of the run counts as lost."""
    cascade: bool = False
    """Train on questions with the earlier stages' questions about the same image, and their references,
    ahead of each."""
    compile: bool = False
    """Have torch.compile make kernels of the decoder layers for training; the first steps take longer."""

    @field_validator("checkpoint_layers", mode="before")
    @classmethod
    def _layers_or_word(cls, value: object) -> object:
        return _number_or(value, 0, "auto", "all")

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: object) -> object:
        if value == "fp16":
            raise ValueError("fp16 overflows in Qwen's activations; use bf16 or fp32")
        return value


class Eval(_Section):
    every: float | None = Field(None, gt=0, le=COUNT)
    """Evaluate every so many steps (above 1) or this share of an epoch (1 or less); null: only at the end."""
    split: Part = "val"
    """Part to evaluate during training."""
    questions: int | None = Field(None, ge=1, le=COUNT)
    """How many questions of it: a choice, the same for every seed, in which every question type has its
    share, and at least one where there is room; null: all."""
    metric: Metric = "exact"
    """What `keep_best` and `patience` compare: `loss` (of the reference answers, on the same questions) and
    `ece`, the smaller the better, or another score of docs/metrics.md that applies to the questions."""
    keep_best: bool = True
    """Keep the best checkpoint, of several with the same score that with the smallest loss, and use it for
    the final evaluation."""
    patience: int | None = Field(None, ge=1, le=COUNT)
    """Stop early: end the training after so many evaluations in a row without a new best; null: never."""
    final: Part | None = "test"
    """Part to evaluate when training ends; null: none."""
    answers: Literal["generate", "labels"] = "generate"
    """`generate`: the model writes its answer; `labels`: it chooses the most probable of its question type's
    closed set, and predictions.jsonl gets the probability of each."""
    max_new_tokens: int = Field(64, ge=1, le=100_000)
    """Longest answer, in tokens with its end of turn (for `answers: generate`). Longer ones are cut and
    marked. `surgvqa check` and training warn of right answers that do not fit."""
    cascade: Literal["none", "answers", "references"] = "none"
    """Answer stage by stage, and put the earlier stages' questions about the same image ahead of each
    question, with the `answers` that the model gave or with their `references`."""

    @property
    def parts(self) -> set[Part]:
        """The parts that training evaluates, on its way or at its end."""
        return {part for part in (self.split if self.every else None, self.final) if part}


class Checkpoint(_Section):
    every: int | None = Field(None, ge=1, le=COUNT)
    """Save every so many steps; null: only at the end and where evaluation finds a new best."""
    keep: int = Field(2, ge=2, le=COUNT)
    """How many of the newest to keep, beside the best."""


class Log(_Section):
    trace: bool = False
    """Write trace.jsonl: ids, supervised tokens and exact loss of every step."""
    profile: bool = False
    """Write profile/*.pt.trace.json, three steps (the fourth to the sixth) that TensorBoard's profiler or
    Perfetto shows."""


class Recipe(_Section):
    """One experiment. Build it with `load`; `dump` writes it with every default filled in."""

    model: Model
    data: Data
    prompt: Prompt = Prompt()
    image: Image
    batch: Batch = Batch()
    loss: Loss = Loss()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    output: Place = Field(min_length=1)
    """The run's folder."""

    def dump(self) -> str:
        """The recipe as YAML with every key, which `load` reads back to an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """`key: ours → theirs` for each key in which two recipes differ."""
        ours, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return [
            f"{key}: {ours.get(key)!r} → {theirs.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides such as `train.lr=1e-4`.

    Raises BadInput listing every problem, each as `file: key: what is wrong`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        if "=" in str(path):
            raise BadInput(f"{path}: is not a recipe; the recipe's file comes before key=value") from None
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadInput(f"{path}: cannot be read as a recipe: {reason}") from None
    return parse(text, overrides, where=str(path))


def parse(text: str, overrides: Iterable[str] = (), where: str = "recipe") -> Recipe:
    """`load` for text already in memory; `where` begins each problem."""
    try:
        tree = yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadInput(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{where}: a recipe is a set of keys (model, data, image, ...), not {_shown(tree)}")
    overrides = list(overrides)
    problems = [f"{where}: {problem}" for override in overrides for problem in _override(tree, override)]
    recipe, found = None, []
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        found = [_problem(detail) for detail in error.errors()]
    if recipe is not None:
        found = _contradictions(recipe)
    for problem in found:
        key = problem.partition(":")[0]
        given = [o for o in overrides if f"{o.partition('=')[0]}.".startswith(f"{key}.")]
        problems.append(f"{where}{f' with {given[-1]}' if given else ''}: {problem}")
    if recipe is None or problems:
        raise BadInput(problems)
    return recipe


def _contradictions(recipe: Recipe) -> list[str]:
    """What no single key shows: keys that exclude or need each other."""
    found = []
    image, data, model, train = recipe.image, recipe.data, recipe.model, recipe.train
    if image.mode == "letterbox":
        if image.size is None:
            found.append("image.size: missing; mode letterbox needs the side of its square canvas, e.g. 768")
        if image.max_tokens is not None:
            found.append("image.max_tokens: is for mode native; mode letterbox takes image.size")
    else:
        if image.max_tokens is None:
            found.append("image.max_tokens: missing; mode native needs the most tokens an image may have")
        if image.size is not None:
            found.append("image.size: is for mode letterbox; mode native takes image.max_tokens")
        if image.fill != "black" and image.augment == "none":
            found.append("image.fill: is for mode letterbox or image.augment; mode native pads nothing")
    for number, source in enumerate(data.sources):
        found += _source_contradictions(source, f"data.more.{number - 1}" if number else "data")
    if data.split.val + data.split.test >= 1:
        found.append("data.split: val and test together leave nothing to train on")
    found += _split_contradictions(data.split)
    if data.balance == "answer" and recipe.loss.class_weights != "none":
        found.append("loss.class_weights: data.balance: answer makes all answers equally frequent already")
    if recipe.batch.questions_per_image > recipe.batch.questions:
        found.append("batch.questions_per_image: is larger than batch.questions, which bounds every group")
    if train.lr_vision is not None and not model.train_vision:
        found.append("train.lr_vision: the vision tower does not train; set model.train_vision: true")
    if train.lr_merger is not None and not model.train_merger:
        found.append("train.lr_merger: the merger does not train; set model.train_merger: true")
    if model.adapter and _within(model.adapter, recipe.output):
        found.append("model.adapter: is this run's own folder; the same command resumes a run without it")
    if model.tune == "full" and model.lora != Lora():
        found.append("model.lora: is for tune: lora, but tune is full")
    if model.revision is not None and (model.name.startswith("tiny-") or Path(model.name).is_dir()):
        found.append(f"model.revision: {model.name} is no hub id, so it has none")
    if recipe.eval.every and recipe.eval.cascade == "answers" and recipe.eval.questions:
        found.append("eval.questions: is for cascade none or references; answers needs all questions: null")
    if recipe.eval.patience and not (recipe.eval.every and recipe.eval.keep_best):
        lacking = "eval.every" if recipe.eval.keep_best else "eval.keep_best: true"
        found.append(f"eval.patience: counts evaluations without a new best, so it needs {lacking}")
    if recipe.eval.every and recipe.eval.keep_best and recipe.eval.split == recipe.eval.final:
        found.append(
            "eval.keep_best: would choose the checkpoint on the part that eval.final then scores it on; "
            "evaluate on another part during training, or set eval.keep_best: false"
        )
    return found


def _within(path: str, folder: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def _split_contradictions(split: Split) -> Iterator[str]:
    if split.by in ("official", "frozen") and split != Split(by=split.by, path=split.path):
        yield (
            'data.split: val, test, seed and stratify are for by "image" or "group", '
            f"not for {json.dumps(split.by)}"
        )
    if split.by == "frozen" and split.path is None:
        yield "data.split.path: missing; a frozen split is a file, which `surgvqa split` writes"
    if split.by != "frozen" and split.path is not None:
        yield f"data.split.path: is for by: frozen; by {split.by} reads no file"


def _source_contradictions(source: Source, where: str) -> Iterator[str]:
    if source.format != "demo" and source.path is None:
        yield f"{where}.path: missing; format {source.format} needs the place of the data"
    if source.revision is not None and (source.path is None or Path(source.path).exists()):
        yield f"{where}.revision: is for a hub id; the data is on this machine"
    known = MAPPED.get(source.format, frozenset())
    if unknown := sorted(source.columns.keys() - known):
        what = f"format {source.format} has {', '.join(sorted(known))}" if known else "is for tables"
        yield f"{where}.columns: {', '.join(unknown)} cannot be mapped; {what}"
    yield from _wrong_columns(source, where)
    if source.list_answers is not None and (not known or source.format in ("llava", "messages")):
        yield f"{where}.list_answers: is for tables and hub data sets, whose answers may be lists"
    if source.group_pattern is not None and not known:
        yield f"{where}.group_pattern: format {source.format} has groups of its own"
    if source.boxes != "auto" and not known:
        yield f"{where}.boxes: format {source.format} has boxes of a known unit, or none"
    forms = VARIANTS.get(source.format, ())
    if source.variant is not None and source.format != "hub" and source.variant not in forms:
        has = (
            f"format {source.format} has {', '.join(forms[:-1])} and {forms[-1]}"
            if forms
            else f"{source.format} has only one form"
        )
        yield f"{where}.variant: {source.variant!r} is none; {has}"
    if source.frames is not None and source.format not in _OF_CLIPS:
        yield f"{where}.frames: is for {' and '.join(_OF_CLIPS)}, whose questions are about clips"
    suffix = Path(source.path or "").suffix.lstrip(".")
    if source.format in _TABLES and suffix in _TABLES and suffix != source.format:
        yield f"{where}.format: is {source.format}, but {where}.path ends in .{suffix}"


def _wrong_columns(source: Source, where: str) -> Iterator[str]:
    """Yield the errors in `columns`."""
    for ours, theirs in source.columns.items():
        place = f"{where}.columns.{ours}"
        names = theirs if isinstance(theirs, list) else [theirs or ""]
        if theirs is None and ours in NEEDED:
            yield f"{place}: is null, but format {source.format} needs it; give the data's name of it"
        elif theirs is not None and not all(name.strip() for name in names or [""]):
            yield f"{place}: is empty; give the data's name of that column, null for none, or leave it out"
        elif isinstance(theirs, list) and (ours not in SEVERAL or source.format in ("llava", "messages")):
            yield f"{place}: is a list; only image and choices of tables may be several columns"
        elif len(set(names)) < len(names):
            yield f"{place}: has a column more than once"


def _problem(detail: Mapping[str, Any]) -> str:
    """One pydantic error as `key: what is wrong`."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggestion(tuple(map(str, detail['loc'])))}"
    if detail["type"] == "missing":
        return f"{path}: missing"
    if detail["type"] == "value_error":
        return f"{path}: {detail['ctx']['error']}"
    return f"{path}: {detail['msg'][0].lower()}{detail['msg'][1:]}, not {_shown(detail['input'])}"


def _suggestion(path: tuple[str, ...]) -> str:
    """The nearest key of the same section, or the same key where it belongs."""
    section: Any = Recipe
    for part in path[:-1]:
        section = get_args(section)[0] if part.isdigit() else section.model_fields[part].annotation
    close = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.6)
    if close:
        return f', did you mean "{close[0]}"?'
    elsewhere = [key for key in _all_keys(Recipe) if key.split(".")[-1] == path[-1]]
    return (
        f', did you mean "{elsewhere[0]}"?'
        if elsewhere
        else f"; known here: {', '.join(section.model_fields)}"
    )


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _all_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def reference() -> str:
    """Every key with its default and meaning, as a Markdown table: the body of docs/recipe.md."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in _all_keys(Recipe):
        section: Any = Recipe
        *parents, name = key.split(".")
        for parent in parents:
            section = section.model_fields[parent].annotation
        field = section.model_fields[name]
        default = (
            "required"
            if field.is_required()
            else f"`{yaml.safe_dump(field.default, default_flow_style=True).split(chr(10))[0]}`"
        )
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _shown(value: object) -> str:
    return reprlib.repr(value)


def _override(tree: dict[str, Any], override: str) -> list[str]:
    """Set `a.b=value` in the tree of keys; returns what is wrong with the override's form."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        return [f"override {override!r}: write it as key=value, e.g. train.lr=1e-4"]
    try:
        parsed = yaml.load(value, _Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        return [f"override {override!r}: not a YAML value: {' '.join(str(error).split())}"]
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[name] = parsed
    return []


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `1e-4` is a number, `yes` and `18:00` are text, keys are given once."""

    # Not YAML 1.1's: those that follow are all there are. PyYAML declares no ClassVar.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            # A few of them, nested, are gigabytes.
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", None)
        tag = getattr(self.peek_event(), "tag", None)  # type: ignore[no-untyped-call]
        if tag is not None:  # `!!type`, which the text itself does not show
            raise yaml.composer.ComposerError(None, None, f"tags ({tag}) are not allowed", None)
        return super().compose_node(parent, index)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # YAML 1.1 took 010 for eight

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something other than text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: object) -> bool:
        return True


if __name__ == "__main__":
    print(reference(), end="")
