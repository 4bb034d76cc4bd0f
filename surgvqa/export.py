"""A part of the data, and a run's answers to it, as lmms-eval and VLMEvalKit take them; docs/export.md.

    recipe or run ── rows ──▶ Row(example, prompt, answer) ── lmms-eval ──▶ task, parquet, logs
                                                           └─ vlmevalkit ─▶ table, predictions

Both get the prompts that the model was trained on, pictures that show in any viewer what it saw, and the
scorer of `surgvqa evaluate` as source code, so that their exact match is ours. Imports no torch.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from string import Template, ascii_uppercase
from typing import Any

from PIL import Image

import surgvqa
from surgvqa import letterbox, metrics, recipe
from surgvqa.audit import closed_set, condensed, load_and_audit
from surgvqa.datasets import Example, ImageRef, normalise
from surgvqa.metrics import Prediction
from surgvqa.recipe import BadInput, Part, Recipe
from surgvqa.results import load_run

NO_BREAK_SPACE = "\u00a0"

_NOT_TEXT = frozenset(
    {
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
        "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "true", "false",
    }
)  # fmt: skip
"""What `pandas.read_csv` takes for a missing value (`na_values` in its documentation) or a truth value."""

LARGE = 10**9
"""Bytes of a table from which on VLMEvalKit (over 2^30) would unpack it by itself."""

_ROW_GROUP = 64 * 2**20
"""Bytes of images in a row group of a parquet file; within one, an image is stored once."""


@dataclass(frozen=True)
class Row:
    """One question as it is asked, and the run's answer, if there is a run."""

    example: Example
    prompt: str
    """The question and its type's instruction, as the model reads them."""
    answer: str | None = None

    @property
    def references(self) -> list[str]:
        return list(self.example.answers)


@dataclass
class Export:
    """What is written, and what a reader of it has to know."""

    out: Path
    """The folder that it will be."""
    name: str
    """Of the task or table; letters, digits and underscores."""
    part: Part
    settings: Recipe
    rows: Sequence[Row]
    notes: list[str] = field(default_factory=list)
    redrawn: set[str] = field(default_factory=set)
    """Keys of the images that are not written as they are."""
    _last: tuple[str, list[bytes]] = ("", [])

    @property
    def answered(self) -> bool:
        return self.rows[0].answer is not None

    @property
    def exact(self) -> float | None:
        """Share of right answers; None without a run."""
        if not self.answered:
            return None
        return sum(metrics.exact(row.answer or "", row.references) for row in self.rows) / len(self.rows)

    def pictures(self, example: Example) -> list[bytes]:
        """Its image files, which any viewer shows as the model saw them: the source's own bytes, or else PNG.

        Others convert images with PIL's `convert("RGB")`, which clips 16-bit grey to white and shows what is
        behind transparent pixels, and VLMEvalKit turns no image as EXIF says. Raises BadInput.
        """
        if self._last[0] != example.image_key:
            self._last = example.image_key, [self._picture(ref) for ref in example.images]
        return self._last[1]

    def _picture(self, ref: ImageRef) -> bytes:
        try:
            data = ref.read()
            shown = letterbox.open_rgb(data)
        except (OSError, ValueError) as error:
            raise BadInput(f"image {ref.key}: {error}") from None
        # What is shorter than 64 characters of base64 VLMEvalKit takes for the number of another row.
        if len(data) > 48 and Image.open(BytesIO(data)).convert("RGB").tobytes() == shown.tobytes():
            return data
        self.redrawn.add(ref.key)
        file = BytesIO()
        shown.save(file, "PNG")
        return file.getvalue()


def export(
    source: str | Path, to: str, out: Path, split: Part | None = None, overrides: Sequence[str] = ()
) -> Export:
    """Write what `surgvqa export` is asked for into the new folder `out`.

    `source` is a recipe's file, or a run's folder, whose predictions are then exported, too. `to` is one of
    FORMS. Raises BadInput.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput(f"--out {out}: is there already; give a new folder")
    opened = _from_run if Path(source).is_dir() else _from_recipe
    made = opened(Path(source), out, split, overrides)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            FORMS[to](made, aside)
            aside.chmod(0o755)
            aside.replace(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return made


def _from_recipe(file: Path, out: Path, split: Part | None, overrides: Sequence[str]) -> Export:
    settings = recipe.load(file, overrides)
    part = split or settings.eval.final or "test"
    return _export(out, file.stem, part, settings, {}, str(file))


def _from_run(folder: Path, out: Path, split: Part | None, overrides: Sequence[str]) -> Export:
    found = load_run(folder).evaluation(split)
    settings = recipe.load(folder / "recipe.yaml", [*found.overrides, *overrides])
    answers = {prediction.id: prediction for prediction in found.predictions}
    if not answers:
        raise BadInput(f"{found.predictions_file}: holds no predictions")
    part = split or found.split or settings.eval.final or "test"
    made = _export(out, folder.resolve().name, part, settings, answers, str(found.predictions_file))
    if settings.eval.answers == "labels":
        made.notes.append("The run's answers were chosen among labels (`eval.answers: labels`), not written.")
    if cut := sum(row.example.id in answers and answers[row.example.id].cut for row in made.rows):
        made.notes.append(f"{cut} of the run's answers were cut at `eval.max_new_tokens`.")
    return made


def _export(
    out: Path, stem: str, part: Part, settings: Recipe, answers: dict[str, Prediction], place: str
) -> Export:
    dataset, found = load_and_audit(settings, evaluated=[part], progress=True)
    if errors := [problem for problem in found.problems if not problem.warning]:
        raise BadInput(condensed(errors))
    examples = dataset.part(part)
    if not examples:
        raise BadInput(f"{place}: the data has no {part} part to export; choose another with --split")
    notes = [f"Left out: {line}" for line in condensed(found.skipped)]
    if answers:
        notes += _unanswered(examples, answers, place)
        examples = [example for example in examples if example.id in answers]
    asked = [example for example in examples if not example.asked_regions]
    if not asked:
        raise BadInput(f"{place}: all questions point at boxes, which each model reads in its own way")
    if len(asked) < len(examples):
        notes.append(
            f"Left out: {len(examples) - len(asked)} questions that point at boxes, which each model reads "
            "in its own way."
        )
    if boxed := sum(bool(example.regions) for example in asked):
        notes.append(f"{boxed} answers have boxes; only their text is here and is scored.")
    if settings.prompt.system is not None:
        notes.append(
            "The system message is not part of this; give it to the model: "
            f"{json.dumps(settings.prompt.system, ensure_ascii=False)}"
        )
    if settings.eval.cascade != "none":
        notes.append(
            f"The recipe asks in a cascade (`eval.cascade: {settings.eval.cascade}`); here each question "
            "stands without the earlier ones."
        )
    instructions = settings.prompt.instructions
    rows = [
        Row(example, example.prompt(instructions), answers[example.id].answer if answers else None)
        for example in asked
    ]
    word = re.sub(r"[^a-z0-9]+", "_", f"{stem}_{part}".lower()).strip("_")
    return Export(out, word if word.startswith("surgvqa") else f"surgvqa_{word}", part, settings, rows, notes)


def _unanswered(examples: Sequence[Example], answers: dict[str, Prediction], place: str) -> Iterator[str]:
    """How many questions have no prediction. Raises BadInput for predictions of other questions."""
    known = {example.id: example for example in examples}
    other = [
        f"{place}: question {row.id!r} is not what the recipe's data has; put the data back that the run "
        "answered"
        for row in answers.values()
        if row.id not in known
        or row.question != known[row.id].question
        or row.references != list(known[row.id].answers)
    ]
    if other:
        raise BadInput([*other[:20], *([f"{place}: {len(other) - 20} more such"] if len(other) > 20 else [])])
    if missing := len(known) - len(answers):
        yield f"Left out: {missing} questions that the run has no prediction for."


# lmms-eval


def _lmms_eval(made: Export, folder: Path) -> None:
    """A task folder, and with a run its answers in both forms of lmms-eval's logs.

    From lmms-eval 0.7.3 (PyPI): `lmms_eval/api/task.py` TaskConfig, ConfigurableTask.download (calls
    `datasets.load_dataset(path, data_files=...)`), process_results; `lmms_eval/utils.py` load_yaml_config
    (`!function module.name` beside the YAML file, relative `data_files` from the YAML file's folder on);
    `lmms_eval/evaluator_utils.py` calculate_clt_aggregate_metric (items with `score` and the `cluster_key`);
    `lmms_eval/models/simple/from_log.py` (answers out of a log); `lmms_eval/loggers/evaluation_tracker.py`
    save_results_samples and `lmms_eval/baselines/loader.py` (`*_samples_*.jsonl`).
    """
    kinds = _metric_names(row.example.question_type for row in made.rows)
    (folder / "data").mkdir()
    _parquet(made, folder / f"data/{made.part}.parquet")
    listed = "".join(
        f"  - metric: {metric}\n    aggregation: !function utils.mean\n    higher_is_better: true\n"
        for metric in ("exact", *kinds.values())
    )
    words = {
        **_words(made),
        "part": made.part,
        "tokens": str(made.settings.eval.max_new_tokens),
        "metrics": listed,
        "kinds": ascii(kinds),  # a literal whatever the types' names are
    }
    _write(folder / f"{made.name}.yaml", _LMMS_TASK, words)
    _write(folder / "utils.py", _LMMS_UTILS, words)
    replay = ""
    if made.answered:
        (folder / "predictions").mkdir()
        _lmms_logs(made, kinds, folder / "predictions")
        replay = Template(_LMMS_REPLAY).substitute(words)
    _write(folder / "README.md", _LMMS_README, {**words, "replay": replay, "notes": _notes(made)})


def _metric_names(kinds: Iterable[str]) -> dict[str, str]:
    """Question type → name of its metric. lmms-eval joins these with commas and other words."""
    names: dict[str, str] = {}
    for kind in sorted(set(kinds)):
        plain = name = "exact_" + (re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") or "type")
        number = 1
        while name in names.values():
            number += 1
            name = f"{plain}_{number}"
        names[kind] = name
    return names


def _parquet(made: Export, file: Path) -> None:
    """The rows as `datasets` reads them, images as its Image feature: of one image each, or of a list."""
    import pyarrow
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature
    from pyarrow import parquet

    single = all(len(row.example.images) == 1 for row in made.rows)
    images = {"image": ImageFeature()} if single else {"images": List(ImageFeature())}
    texts = {name: Value("string") for name in ("id", "question", "prompt", "question_type", "group")}
    schema = Features({**images, **texts, "references": List(Value("string"))}).arrow_schema
    with parquet.ParquetWriter(file, schema, dictionary_pagesize_limit=2 * _ROW_GROUP) as writer:

        def flush() -> None:
            if rows:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows.clear()

        rows: list[dict[str, Any]] = []
        size = 0
        for row in made.rows:
            example = row.example
            files = made.pictures(example)
            size += sum(map(len, files))
            pictures = [{"bytes": file, "path": None} for file in files]
            rows.append(
                {
                    **({"image": pictures[0]} if single else {"images": pictures}),
                    "id": example.id,
                    "question": example.question,
                    "prompt": row.prompt,
                    "question_type": example.question_type,
                    "group": example.group,
                    "references": row.references,
                }
            )
            if size > _ROW_GROUP:
                flush()
                size = 0
        flush()


def _lmms_logs(made: Export, kinds: dict[str, str], folder: Path) -> None:
    """The answers as the model `from_log` reads them, and as `--log_samples` writes and `--baseline` reads
    them."""
    log = {
        "args": {"model": "surgvqa", "model_args": "", "limit": None},
        "model_configs": {"task": made.name},
        "logs": [{"doc_id": number, "resps": [[row.answer]]} for number, row in enumerate(made.rows)],
    }
    (folder / "from_log.json").write_text(json.dumps(log, ensure_ascii=False), encoding="utf-8")
    with (folder / f"surgvqa_samples_{made.name}.jsonl").open("w", encoding="utf-8", newline="") as file:
        for number, row in enumerate(made.rows):
            score = float(metrics.exact(row.answer or "", row.references))
            item = {"score": score, "group": row.example.group}
            sample = {
                "doc_id": number,
                "target": str(row.references),
                "filtered_resps": row.answer,
                "exact": item,
                kinds[row.example.question_type]: item,
                "score": score,
                "input": row.prompt,
            }
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


# VLMEvalKit


def _vlmevalkit(made: Export, folder: Path) -> None:
    """A table of open questions for the folder `LMUData`, and with a run its predictions.

    From VLMEvalKit (ms-vlmeval 0.0.20 on PyPI): `vlmeval/dataset/__init__.py` build_dataset (a table that it
    does not know is a CustomVQADataset) and DATASET_TYPE (only with `openended` in its name is it no choice
    among A to D); `vlmeval/dataset/image_base.py` ImageBaseDataset (`image` is base64, a list of these, or
    the `index` of the row that holds it; `image_path` names the file that it is unpacked to), build_prompt;
    `vlmeval/dataset/utils/vqa_eval.py` process_line (several references are a list's literal);
    `vlmeval/smp/file.py` load (`pd.read_csv(f, sep="\\t")`) and get_pred_file_path.
    """
    made.name += "_openended"
    # JSON without escapes is a literal of Python, too, and never a number or missing.
    answers = [json.dumps(row.references, ensure_ascii=False) for row in made.rows]
    _vlm_tables(made, folder, {"answer": answers}, [row.answer for row in made.rows])
    words = _words(made)
    _write(folder / "score.py", _VLM_SCORE, words)
    ours = Template(_VLM_OURS).substitute(words) if made.answered else ""
    _write(folder / "README.md", _VLM_README, {**words, "ours": ours, "notes": _notes(made)})


def _vlm_choices(made: Export, folder: Path) -> None:
    """The same as a choice among each question's labels, which VLMEvalKit scores itself.

    From VLMEvalKit (ms-vlmeval 0.0.20 on PyPI): `vlmeval/dataset/__init__.py` build_dataset (a table with
    columns A and B is a CustomMCQDataset), `vlmeval/dataset/image_mcq.py` build_prompt and evaluate (columns
    A to Z; an empty one is no choice; `answer` and `prediction` are letters).
    """
    made.name += "_choices"
    sets = [list(closed_set(made.settings, row.example)) for row in made.rows]
    letters = [
        [_letter(labels, reference) for reference in row.references]
        for labels, row in zip(sets, made.rows, strict=True)
    ]
    unfit = {
        row.example.question_type: f"{len(labels)} labels"
        for labels, right, row in zip(sets, letters, made.rows, strict=True)
        if not (2 <= len(labels) <= len(ascii_uppercase)) or len(set(right)) > 1 or None in right
    }
    if unfit:
        kinds = ", ".join(f"{kind} ({what})" for kind, what in sorted(unfit.items()))
        raise BadInput(
            f"question types {kinds}: a choice needs 2 to 26 labels (data.labels) and just one of them "
            "right; use --to vlmevalkit"
        )
    columns = {"answer": [right[0] or "" for right in letters]}
    for number, letter in enumerate(ascii_uppercase[: max(map(len, sets))]):
        columns[letter] = [labels[number] if number < len(labels) else "" for labels in sets]
    chosen = [
        None if row.answer is None else _letter(labels, row.answer) or row.answer
        for labels, row in zip(sets, made.rows, strict=True)
    ]
    _vlm_tables(made, folder, columns, chosen)
    words = _words(made)
    ours = Template(_VLM_OURS_CHOSEN).substitute(words) if made.answered else ""
    _write(folder / "README.md", _VLM_README_CHOICES, {**words, "ours": ours, "notes": _notes(made)})


def _letter(labels: Sequence[str], answer: str) -> str | None:
    alike = [normalise(label) for label in labels]
    wanted = normalise(answer)
    return ascii_uppercase[alike.index(wanted)] if wanted in alike[:26] else None


def _vlm_tables(
    made: Export, folder: Path, columns: Mapping[str, Sequence[str]], answers: Sequence[str | None]
) -> None:
    """NAME.tsv and, with a run, surgvqa/surgvqa_NAME.tsv: index, id, question, category, split, `columns`."""
    texts = {
        "id": [row.example.id for row in made.rows],
        "question": [row.prompt for row in made.rows],
        "category": [row.example.question_type for row in made.rows],
        **columns,
    }
    for name, column in texts.items():
        if name in columns and name != "answer":  # a choice's: empty where there are fewer
            texts[name] = [as_pandas_text(text) if text else "" for text in column]
        else:
            texts[name] = [as_pandas_text(text) for text in column]
        changed = sum(map(str.__ne__, column, texts[name]))
        if changed:
            made.notes.append(
                f"{changed} cells of `{name}` end in a no-break space: without it pandas would read them as "
                "numbers or as missing."
            )
    head = ["index", "split", *texts]
    rows = [
        [str(number), made.part, *cells] for number, cells in enumerate(zip(*texts.values(), strict=True))
    ]
    table = folder / f"{made.name}.tsv"
    with _table(table) as write:
        write([*head, "image", "image_path"])
        for row, images in zip(rows, _packed(made), strict=True):
            write([*row, *images])
    if table.stat().st_size > LARGE:
        with _table(table) as write:
            write([*head, "image_path"])
            for row, image in zip(rows, _unpacked(made, folder), strict=True):
                write([*row, image])
        made.notes.append(
            "VLMEvalKit does not find the images of tables over 1 GB that hold them. So the table names "
            "their files by whole paths: it has to be made anew where the folder goes elsewhere."
        )
    if made.answered:
        (folder / "surgvqa").mkdir()
        with _table(folder / f"surgvqa/surgvqa_{made.name}.tsv") as write:
            write([*head, "prediction"])
            for row, answer in zip(rows, answers, strict=True):
                write([*row, as_pandas_text(answer or "")])


def _packed(made: Export) -> Iterator[tuple[str, str]]:
    """The base64 of each row's images, or the number of the row that has it; and names for them."""
    first: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(made.rows):
        key = row.example.image_key
        if key in first:
            yield first[key]
            continue
        files = made.pictures(row.example)
        # PNG, whatever is packed: it unpacks through PIL, and this loses nothing.
        names = _one_or_list([f"{hashlib.sha256(file).hexdigest()[:24]}.png" for file in files])
        first[key] = str(number), names
        yield _one_or_list([base64.b64encode(file).decode() for file in files]), names


def _unpacked(made: Export, folder: Path) -> Iterator[str]:
    """The images of each row as files, where they will lie."""
    (folder / "images").mkdir()
    known: dict[str, str] = {}
    for row in made.rows:
        key = row.example.image_key
        if key not in known:
            names = []
            for file in made.pictures(row.example):
                kind = letterbox.header(file).format.lower()
                names.append(f"images/{hashlib.sha256(file).hexdigest()[:24]}.{kind}")
                (folder / names[-1]).write_bytes(file)
            known[key] = _one_or_list([str(made.out.resolve() / name) for name in names])
        yield known[key]


def as_pandas_text(value: str) -> str:
    """The value so that pandas reads it as text: what it would take for a number, a truth value or a missing
    one gets a no-break space at its end, which `normalise`, `str.strip` and `str.split` take away."""
    plain = value.strip()
    try:
        complex(plain)  # all that float() takes, and more
    except ValueError:
        return value + NO_BREAK_SPACE if plain in _NOT_TEXT or plain.lower() in _NOT_TEXT else value
    return value + NO_BREAK_SPACE


def _one_or_list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else json.dumps(words)


@contextmanager
def _table(file: Path) -> Iterator[Callable[[Sequence[str]], Any]]:
    """What writes a row of a TSV file as pandas reads it: each cell in quotes, quotes doubled."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        yield csv.writer(lines, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n").writerow


# What is written with both


def _words(made: Export) -> dict[str, str]:
    """What the templates need; `scorer` is the source of `normalise` and `exact`, to do there what they do
    here."""
    return {
        "name": made.name,
        "version": surgvqa.__version__,
        "n": str(len(made.rows)),
        "exact": "" if made.exact is None else f"{made.exact:.6f}",
        "scorer": f"{inspect.getsource(normalise)}\n\n{inspect.getsource(metrics.exact)}".strip(),
    }


def _write(file: Path, template: str, words: dict[str, str]) -> None:
    file.write_text(Template(template).substitute(words).lstrip("\n"), encoding="utf-8")


def _notes(made: Export) -> str:
    if made.redrawn:
        made.notes.append(
            f"{len(made.redrawn)} images are PNG files of what the model saw, as others would show them "
            "differently (turned by EXIF, 16 bits, transparent); all others are the source's own bytes."
        )
    return "".join(f"- {recipe.printable(note)}\n" for note in made.notes)


FORMS: dict[str, Callable[[Export, Path], None]] = {
    "lmms-eval": _lmms_eval,
    "vlmevalkit": _vlmevalkit,
    "vlmevalkit-choices": _vlm_choices,
}
"""What `--to` takes → what writes it into an empty folder."""

_LMMS_TASK = """
# Written by surgvqa $version for lmms-eval 0.7.3 or newer. Paths are relative to this file.
task: $name
dataset_path: parquet
dataset_kwargs:
  data_files:
    $part: data/$part.parquet
test_split: $part
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: !function utils.doc_to_target
generation_kwargs:
  max_new_tokens: $tokens
  temperature: 0
  do_sample: false
  until: []
process_results: !function utils.process_results
cluster_key: group
metric_list:
${metrics}lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
metadata:
  version: 1.0
  surgvqa: "$version"
"""

_LMMS_UTILS = '''
"""What $name.yaml calls. Written by surgvqa $version; needs nothing but Python and what lmms-eval gives."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

KINDS = $kinds
"""Question type -> its metric."""


$scorer


def doc_to_visual(doc):
    return [image.convert("RGB") for image in (doc["images"] if "images" in doc else [doc["image"]])]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    around = lmms_eval_specific_kwargs or {}
    return around.get("pre_prompt", "") + doc["prompt"] + around.get("post_prompt", "")


def doc_to_target(doc):
    return doc["references"]


def process_results(doc, results):
    score = float(exact(results[0], doc["references"]))
    item = {"score": score, "group": doc["group"]}
    return {"exact": item, KINDS[doc["question_type"]]: item, "score": score}


def mean(items):
    return sum(item["score"] for item in items) / len(items)
'''

_LMMS_README = """
# $name

An lmms-eval task, written by surgvqa $version. In this folder, with lmms-eval 0.7.3 or newer:

    lmms-eval --model qwen2_vl --model_args pretrained=Qwen/Qwen2-VL-7B-Instruct \\
        --include_path . --tasks $name --batch_size 1 --log_samples --output_path results

The folder may be moved; `--include_path` may be any path to it. `exact` is surgvqa's exact match, `exact_...`
that of one question type; `stderr_clustered` is the standard error over groups (videos or images).
$replay
$notes"""

_LMMS_REPLAY = """
The run's own predictions are in `predictions/`. To score them with lmms-eval:

    lmms-eval --model from_log --model_args logs=predictions --include_path . --tasks $name

That gives `exact` $exact. To test another model against them, pair by pair:
`--baseline predictions/surgvqa_samples_$name.jsonl`.
"""

_VLM_SCORE = '''
"""Exact match of predictions that VLMEvalKit wrote for $name: python score.py FILE

Written by surgvqa $version. VLMEvalKit has no scores for open questions of a table of one's own. FILE is .tsv
or .json (PRED_FORMAT): its .xlsx does not hold all answers as they were given, `=1+1` becomes 0.
"""

from __future__ import annotations

import csv
import json
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

QUESTIONS = $n


$scorer


def rows(file):
    if file.endswith(".tsv"):
        csv.field_size_limit(sys.maxsize)
        with open(file, encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines, delimiter="\\t"))
    if file.endswith(".json"):
        with open(file, encoding="utf-8") as text:
            return json.load(text)
    sys.exit(f"{file}: is neither .tsv nor .json; set PRED_FORMAT=tsv for VLMEvalKit")


def main(file):
    right = defaultdict(list)
    for row in rows(file):
        hit = exact(str(row["prediction"]), json.loads(row["answer"]))
        for name in ("exact", "exact, " + str(row["category"]).strip()):
            right[name].append(hit)
    for name, hits in sorted(right.items()):
        print(f"{name}\\t{sum(hits) / len(hits):.6f}\\t{len(hits)} questions")
    if len(right["exact"]) != QUESTIONS:
        sys.exit(f"{file}: answers {len(right['exact'])} of {QUESTIONS} questions")


if __name__ == "__main__":
    main(sys.argv[1])
'''

_VLM_README = """
# $name

A table for VLMEvalKit, written by surgvqa $version. In the folder of VLMEvalKit, with FOLDER for this one:

    LMUData=FOLDER PRED_FORMAT=tsv python run.py --data $name --model Qwen2-VL-7B-Instruct \\
        --mode infer --work-dir FOLDER/outputs
    python FOLDER/score.py FOLDER/outputs/Qwen2-VL-7B-Instruct/Qwen2-VL-7B-Instruct_$name.tsv

`--mode infer`, since VLMEvalKit has no scores for open questions of a table of one's own; `score.py` gives
surgvqa's exact match. `answer` is a list of all that count as right, in JSON. Texts are as they are: a cell
may begin with `=`, `+` or `@`. A spreadsheet may run such a cell: import all columns there as text.
$ours
$notes"""

_VLM_OURS = """
The run's own predictions are `surgvqa/surgvqa_$name.tsv`; `score.py` gives them $exact.
"""

_VLM_README_CHOICES = """
# $name

A table of choices for VLMEvalKit, written by surgvqa $version. In the folder of VLMEvalKit, with FOLDER for
this one:

    LMUData=FOLDER PRED_FORMAT=tsv python run.py --data $name --model Qwen2-VL-7B-Instruct \\
        --judge exact_matching --work-dir FOLDER/outputs

The labels are listed in the prompt and a letter is the answer: scores are not those of the same questions
asked openly, as surgvqa asks them. A cell may begin with `=`, `+` or `@`, and a spreadsheet may run it:
import all columns there as text.
$ours
$notes"""

_VLM_OURS_CHOSEN = """
The run's own predictions, as letters, are `surgvqa/surgvqa_$name.tsv`. surgvqa's exact match of them is
$exact; VLMEvalKit finds the same where all of them are labels.
"""
