"""The benchmark of a GPU, as far as a CPU can try it: every case on tiny models, and what may go wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are beside the package, not in it

from benchmarks import gpu  # noqa: E402
from benchmarks.inputs import write_model  # noqa: E402
from surgvqa import hub, model  # noqa: E402
from surgvqa.flops import cost_of  # noqa: E402


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.long
def test_a_dry_run_goes_through_every_case_and_survives_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "train_plain", out_of_memory)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert content["settings"]["dry_run"] is True
    rows = {(row["case"], row["model"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 16
    status = {case: row["status"] for (case, _), row in rows.items()}
    assert status.pop("plain loop") == "out of memory"
    for case in ("trees, SDPA", "trees, compiled layers", "TRL"):
        assert status.pop(case) == "skipped"
    assert set(status.values()) == {"measured"}
    for family in ("tiny Qwen2-VL", "tiny Qwen3-VL"):
        checks = rows["correctness", family]["checks"]
        assert len(checks) == 5
        assert all(check["holds"] for check in checks)
    for (case, _), row in rows.items():
        if row["status"] == "measured" and case != "correctness":
            assert 0 < row["questions_per_s"]["min"] <= row["questions_per_s"]["median"]
            if case.startswith("trees"):
                assert row["tflop_per_question"] > 0
                assert row["questions_per_step"] > 0
    seven = "tiny Qwen2-VL"
    layers = [
        rows[f"trees, {which} recomputed", seven]["checkpoint_layers"]
        for which in ("no layer", "half the layers", "all layers")
    ]
    assert layers == [0, 1, 3]
    assert rows["rows", seven]["tflop_per_question"] == rows["trees", seven]["tflop_per_question"]
    said = capsys.readouterr().out
    assert "out of memory" in said
    assert "holds  tiny Qwen3-VL: answers in fp32" in said
    assert "FAILS" not in said


def test_without_time_every_case_says_that_it_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--dry-run", "--budget", "0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 16
    assert {row["status"] for row in rows} == {"skipped"}
    assert "0 s left of the budget" in capsys.readouterr().out


def test_a_case_that_may_not_fit_into_the_budget_is_left_out() -> None:
    bench: Any = SimpleNamespace(ends=time.monotonic() + 20, cuda=True, release=lambda: None)
    measured = {"questions_per_s": {"median": 1.0}}
    assert gpu.attempt(bench, gpu.Case("a", "m", 10, lambda: measured))["status"] == "measured"
    assert gpu.attempt(bench, gpu.Case("a", "m", 60, lambda: measured))["status"] == "skipped"
    assert gpu.attempt(bench, gpu.Case("a", "m", 10, out_of_memory))["status"] == "out of memory"
    broken = gpu.attempt(bench, gpu.Case("a", "m", 10, lambda: {"x": 1 // 0}))
    assert (broken["status"], broken["why"].split(":")[0]) == ("failed", "ZeroDivisionError")


def test_targets_are_met_or_missed_by_a_share() -> None:
    rows: list[gpu.Row] = [
        {"model": "7B", "case": "trees", "questions_per_s": {"median": 80.0}, "mfu": 0.55},
        {"model": "8B", "case": gpu.LARGE, "peak_gib": None},
    ]
    speed, mfu, peak = gpu.targets(rows, "7B", "8B")
    assert (speed["met"], speed["off_by"]) == (False, pytest.approx(0.2))
    assert (mfu["met"], mfu["off_by"]) == (True, None)
    assert (peak["met"], peak["value"]) == (None, None)


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_random_weights_come_with_the_buffers_of_the_constructor(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = write_model(family, "tiny", tmp_path)
    made = gpu.random_model(folder, torch.device("cpu"), torch.bfloat16)
    usual = model.model_class(family)(AutoConfig.from_pretrained(folder))
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    buffers = dict(made.named_buffers())
    assert buffers.keys() == dict(usual.named_buffers()).keys()
    for name, buffer in usual.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)
    again = gpu.random_model(folder, torch.device("cpu"), torch.bfloat16).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in made.state_dict().items())


@pytest.mark.parametrize("name", ["Qwen2-VL-7B-Instruct", "Qwen3-VL-8B-Instruct"])
def test_shallow_models_are_as_wide_as_the_real_ones(shared: Path, name: str, tmp_path: Path) -> None:
    real = hub.find(str(shared / "qwen" / name))
    made = hub.find(str(gpu.shallow(real.path, tmp_path / "shallow")))
    few, all_ = model.skeleton(made), model.skeleton(real)
    assert len(model.decoder_layers(few)) == len(few.model.visual.blocks) == 4
    wide = dict(all_.named_parameters())
    assert all(parameter.shape == wide[key].shape for key, parameter in few.named_parameters())
    layers = len(model.decoder_layers(all_))
    assert cost_of(few).token == pytest.approx(cost_of(all_).token * 4 / layers)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_without_a_gpu_the_script_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert "no nvidia-smi" in done.stderr
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "--dry-run" in capsys.readouterr().err
