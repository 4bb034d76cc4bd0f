"""Tables and figures of a run, and the notebook that shows them, executed from its first cell to its last."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import surgvqa
from surgvqa import plots
from surgvqa.datasets import Region
from surgvqa.metrics import normalise
from surgvqa.recipe import BadInput

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "evaluate.ipynb"


def drawn(figure: Any) -> np.ndarray[Any, Any]:
    """A figure as pixels; warnings of the drawing are errors."""
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=50)
    return np.asarray(Image.open(stream).convert("RGB"))


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_table_has_a_row_for_each_question(tiny_run: Path) -> None:
    evaluation = surgvqa.load_run(tiny_run).evaluation()
    table = evaluation.table()
    lines = [json.loads(line) for line in (tiny_run / "predictions.jsonl").open(encoding="utf-8")]
    assert list(table.columns) == [
        "id", "image", "group", "type", "question", "reference", "answer", "right", "confidence", "cut",
    ]  # fmt: skip
    assert list(table["id"]) == [line["id"] for line in lines]
    assert table["right"].mean() == pytest.approx(evaluation.scores["overall"]["exact"])
    assert (table["confidence"] == [line["probabilities"][line["answer"]] for line in lines]).all()
    assert 0 < table["right"].sum() < len(table)


def test_of_several_references_the_one_that_was_met_is_shown(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    row = json.loads((run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    row = {**row, "references": ["none", "one"], "probabilities": None}
    both = [{**row, "answer": "one.", "id": "1"}, {**row, "answer": "two", "id": "2"}]
    (run / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in both))
    table = surgvqa.load_run(run).evaluation().table()
    assert list(table["reference"]) == ["one", "none"]
    assert list(table["right"]) == [True, False]
    assert table["confidence"].isna().all()


def test_the_scores_are_those_of_scores_json(tiny_run: Path, tmp_path: Path) -> None:
    evaluation = surgvqa.load_run(tiny_run).evaluation()
    table, overall = evaluation.scores_table(), evaluation.scores["overall"]
    assert list(table.index) == ["all", *evaluation.scores["by_type"]]
    assert table.loc["all", "questions"] == overall["n"]
    assert table.loc["all", ["low", "high"]].tolist() == [100 * end for end in overall["intervals"]["exact"]]
    assert table.loc["all", "prior"] == 100 * overall["prior"]
    few = {kind for kind, row in evaluation.scores["by_type"].items() if row["few"]}
    assert (
        few == {kind for kind in table.index if "fewer than 20 questions" in table.loc[kind, "note"]} != set()
    )
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "scores.json").write_text('{"schema": 1, "overall": {"n": 2, "exact": 1, "prior": 0}}')
    with pytest.raises(BadInput, match="holds no scores of this form; run `surgvqa evaluate` again"):
        surgvqa.load_run(run).evaluation().scores_table()
    (run / "scores.json").unlink()
    with pytest.raises(BadInput, match="holds no scores of this form; run `surgvqa evaluate` again"):
        surgvqa.load_run(run).evaluation().scores_table()


def test_a_comparison_as_a_table(tiny_run: Path) -> None:
    found = surgvqa.compare(tiny_run, tiny_run)
    table = found.table()
    assert (table["difference"] == 0).all()
    assert table.loc[("all", "exact"), "a"] == found.overall.scores["exact"].a
    assert table.loc[("count", "exact"), "questions"] == found.by_type["count"].n
    assert list(table.loc["all"].index) == list(found.overall.scores)


def test_pictures_are_those_of_the_data(tiny_run: Path, tmp_path: Path) -> None:
    run = surgvqa.load_run(tiny_run)
    prediction = run.evaluation().predictions[0]
    (picture,) = run.pictures(prediction)
    with Image.open(tiny_run.parent / "data" / prediction.image) as image:
        assert picture.tobytes() == image.convert("RGB").tobytes()
    other = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text.replace(str(tiny_run.parent / "data"), "/nowhere"))
    with pytest.raises(BadInput, match="/nowhere"):
        surgvqa.load_run(other).pictures(prediction)
    data = shutil.copytree(tiny_run.parent / "data", tmp_path / "data")
    (other / "recipe.yaml").write_text(text.replace(str(tiny_run.parent / "data"), str(data)))
    (data / prediction.image).write_bytes(b"no image")
    with pytest.raises(BadInput, match=f"image {prediction.image}: is not an image"):
        surgvqa.load_run(other).pictures(prediction)
    (data / prediction.image).unlink()
    with pytest.raises(BadInput, match="the data do not have it with the image"):
        surgvqa.load_run(other).pictures(prediction)


def test_figures_show_what_was_found(tiny_run: Path, tmp_path: Path) -> None:
    run = surgvqa.load_run(tiny_run)
    evaluation = run.evaluation()
    figure = plots.curves(run)
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [6, 2]
    assert list(figure.axes[0].lines[0].get_ydata()) == [row["loss"] for row in run.steps]
    assert list(figure.axes[1].lines[0].get_ydata()) == [row["exact"] for row in run.validations]
    said = texts(plots.by_type(evaluation))
    assert f"all ({evaluation.scores['overall']['n']})" in said
    assert "prior" in said
    figure = plots.reliability(evaluation)
    bins = evaluation.scores["overall"]["reliability"]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [row["n"] for row in bins]
    for whole in (plots.curves(run), plots.by_type(evaluation), figure):
        assert drawn(whole).std() > 1
    empty = tmp_path / "run"
    empty.mkdir()
    shutil.copy(tiny_run / "recipe.yaml", empty)
    with pytest.raises(BadInput, match="has no curves"):
        plots.curves(surgvqa.load_run(empty))


def test_a_confusion_matrix_counts_every_question_of_its_type(tiny_run: Path) -> None:
    evaluation = surgvqa.load_run(tiny_run).evaluation()
    rows = [row for row in evaluation.predictions if row.question_type == "yes_no"]
    (axes,) = plots.confusion(evaluation, "yes_no").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["no", "yes"]
    found = {
        (names[round(text.get_position()[1])], names[round(text.get_position()[0])]): int(text.get_text())
        for text in axes.texts
    }
    assert found == Counter((normalise(row.references[0]), normalise(row.answer)) for row in rows)
    with pytest.raises(BadInput, match="no question has the type 'odd'; there are colour, count"):
        plots.confusion(evaluation, "odd")


def test_hostile_texts_and_boxes_are_drawn_as_they_are(tiny_run: Path) -> None:
    """`$` begins no formula, control characters are escaped, boxes stand in the picture's pixels."""
    row = surgvqa.load_run(tiny_run).evaluation().predictions[0]
    picture = Image.new("RGB", (200, 100), "white")
    box = {"label": "$a_{1$", "box": [50.0, 20.0, 150.0, 80.0], "image": 0}
    odd = type(row)(**{**row.row(), "question": "$x^{2\x1b[31m", "answer": r"\frac", "regions": [box]})
    figure = plots.answers([odd, odd], [[picture], [picture, picture]])
    said = texts(figure)
    assert r"$x^{2\x1b[31m" in said
    assert "(2 images)" in said
    assert drawn(figure).std() > 1
    answer = surgvqa.Answer(r"$\alpha", "$", {"$b": 0.75, "c": 0.25}, (Region((50, 20, 150, 80), "$a"),))
    figure = plots.answer(picture, answer)
    (rectangle,) = figure.axes[0].patches
    assert rectangle.get_bbox().extents.tolist() == [50, 20, 150, 80]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0.75, 0.25]
    assert drawn(figure).std() > 1


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert code[0]["metadata"]["tags"] == ["parameters"]  # where papermill puts others


def test_the_notebook_runs(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[dev]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e '.[dev]'")
    import nbformat

    other = Path(shutil.copytree(tiny_run, tmp_path / "other"))
    monkeypatch.setenv("RUN", str(tiny_run))
    monkeypatch.setenv("OTHER", str(other))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    told = {cell["id"]: cell.get("outputs", []) for cell in book.cells}
    kinds = {name: [kind for out in own for kind in out.get("data", ())] for name, own in told.items()}
    for name in ("by-type", "curves", "confusion", "reliability", "error-pictures", "ask", "ask-labels"):
        assert "image/png" in kinds[name], name
    for name in ("scores", "errors", "compare"):
        assert "text/html" in kinds[name], name
    (printed,) = told["ask-all"]
    assert printed["text"].count("\n") == 3
    complaints = [out for outputs in told.values() for out in outputs if out.get("name") == "stderr"]
    assert complaints == []
