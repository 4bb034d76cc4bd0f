"""Checkpoints that are damaged or not ours: found by name, never loaded, never a silent restart."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from trajectory.conftest import Runs

from surgvqa import checkpoint
from surgvqa import run as runs_folder
from surgvqa.recipe import BadInput

from .conftest import ONE, Hurt

Make = Callable[[str], Hurt]

LORA = ["model.tune=lora", "model.train_vision=false", "model.train_merger=false"]
TUNES = {"full": [], "lora": LORA}


def damage(file: Path, how: str, moments: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
        return
    if how == "flipped":
        content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[how])


def stop_after(runs: Runs, monkeypatch: pytest.MonkeyPatch, name: str, step: int, *overrides: str) -> Path:
    """The folder of a run that is killed after a step."""
    recorded = runs_folder.Records.step

    def stop(self: object, **row: object) -> None:
        recorded(self, **row)
        if row["step"] == step:
            raise RuntimeError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr(runs_folder.Records, "step", stop)
        with pytest.raises(RuntimeError, match="as if killed"):
            runs.here(name, *overrides)
    return runs.folder / name


@pytest.fixture(scope="module")
def saved(runs: Runs) -> dict[str, Path]:
    """The checkpoints of short runs, of which two are kept."""
    return {
        tune: runs.here(f"saved-{tune}", *words, "train.max_steps=2", "checkpoint.every=1") / "checkpoints"
        for tune, words in TUNES.items()
    }


@pytest.mark.fault("F9")
@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "deleted"])
def test_damage_to_any_file_is_found_by_name(
    saved: dict[str, Path], tmp_path: Path, tune: str, how: str
) -> None:
    root, moments = tmp_path / "checkpoints", random.Random(how)
    shutil.copytree(saved[tune], root)
    older, newest = (folder for _, folder in checkpoint.steps(root))
    files = [file for file in newest.rglob("*") if file.is_file()]
    assert len(files) >= 10
    assert checkpoint.newest(root) == (newest, [])
    for file in files:
        whole = file.read_bytes()
        damage(file, how, moments)
        found, rejected = checkpoint.newest(root)
        name = file.relative_to(newest).as_posix()
        assert found == older, name
        named = [problem.partition(": ")[2].partition(": ")[0] for problem in rejected]
        # A bit of the manifest may be one of another file's digest, and then that file is named.
        assert named == [name] or (how == "flipped" and name == checkpoint.MANIFEST and named)
        file.write_bytes(whole)
    assert checkpoint.newest(root) == (newest, [])


@pytest.mark.fault("F9")
def test_a_run_falls_back_and_goes_on_or_refuses(hurt: Make, reference: Path) -> None:
    """Damage to the newest checkpoint, twice; when all is done to all of them."""
    run, moments, said = hurt("damaged"), random.Random(9), ""
    root = run.folder / "checkpoints"
    hurts = [("model.safetensors", "flipped"), ("trainer/manifest.json", "deleted")]
    for number, (name, how) in enumerate(hurts):
        process = run.start(ONE)
        run.until(lambda: said in run.log and run.steps() >= 5 + 4 * number)  # noqa: B023
        run.kill(signal.SIGTERM)
        assert process.wait(60) == 4, run.log
        newest = checkpoint.steps(root)[-1][1]
        assert newest.name == f"step-{run.steps():06d}"
        damage(newest / name, how, moments)
        said = f"warning: {newest}: {name}: "
    run.finish(ONE)
    assert said in run.log
    run.assert_curve(reference)

    metrics = (run.folder / "metrics.jsonl").read_bytes()
    for _, folder in checkpoint.steps(root):
        damage(folder / "trainer/optimizer.safetensors", "truncated", moments)
    assert run.start(ONE).wait(120) == 2
    assert run.left() == 2
    for _, folder in checkpoint.steps(root):
        assert f"{folder}: trainer/optimizer.safetensors: " in run.log
    assert "no checkpoint is whole; train anew with --fresh --yes" in run.log
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics
    assert "Traceback" not in run.log


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.canary), "w")


def forge_manifest(folder: Path) -> None:
    """A manifest to which all that lies in a folder agrees."""
    manifest = folder / "trainer/manifest.json"
    files = [file for file in folder.rglob("*") if file.is_file() and file != manifest]
    content = {
        file.relative_to(folder).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    manifest.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.long
@pytest.mark.fault("F10")
@pytest.mark.parametrize("tune", TUNES)
def test_a_pickle_is_not_run(
    hurt: Make, runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tune: str
) -> None:
    """In the place of a file of ours, named by a manifest, or lying about."""
    canary = tmp_path / "canary"
    poison = pickle.dumps(Malicious(canary))
    pickle.loads(poison).close()
    assert canary.exists()
    canary.unlink()

    words = [*TUNES[tune], "train.max_steps=6"]
    whole = runs.here(f"whole-{tune}", *words)
    run = hurt(f"poisoned-{tune}")
    saves = ["checkpoint.every=1", "checkpoint.keep=4"]
    stop_after(runs, monkeypatch, run.name, 5, *words, *saves)
    clean, lying, named, replaced = (folder for _, folder in checkpoint.steps(run.folder / "checkpoints"))
    pickles = ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt")
    for folder in (lying, named):
        for name in pickles:
            (folder / name).write_bytes(poison)
    (replaced / "trainer/optimizer.safetensors").write_bytes(poison)
    forge_manifest(named)
    forge_manifest(replaced)
    run.finish(ONE, *words, *saves)
    assert f"warning: {replaced}: trainer/optimizer.safetensors: no safetensors file" in run.log
    for folder in (lying, named):
        for name in pickles:
            assert f"warning: {folder}: {name}: could run code when it is read" in run.log
    assert f"resuming after step {int(clean.name[5:])}" in run.log
    run.assert_curve(whole, rel=1e-5, steps=6)
    assert not canary.exists()


@pytest.mark.fault("F10")
@pytest.mark.parametrize(("tune", "ours", "theirs"), [
    ("lora", "adapter_model.safetensors", "adapter_model.bin"),
    ("full", "model.safetensors", "pytorch_model.bin"),
])  # fmt: skip
def test_weights_as_a_pickle_alone_are_refused(
    hurt: Make, runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tune: str, ours: str, theirs: str
) -> None:
    """What PEFT and transformers would read where the safetensors are gone."""
    run = hurt(f"pickled-{tune}")
    words = [*TUNES[tune], "train.max_steps=3"]
    stop_after(runs, monkeypatch, run.name, 2, *words, "checkpoint.every=1")
    ((_, folder),) = checkpoint.steps(run.folder / "checkpoints")
    (folder / ours).unlink()
    forge_manifest(folder)
    with pytest.raises(BadInput, match=f"{folder}.*{ours}"):
        runs.here(run.name, *words)
    (folder / theirs).write_bytes(pickle.dumps(Malicious(tmp_path / "canary")))
    with pytest.raises(BadInput, match=f"{theirs}: could run code when it is read"):
        runs.here(run.name, *words)
    assert not (tmp_path / "canary").exists()
