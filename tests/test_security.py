"""Hostile recipes, data, models, checkpoints and run folders: nothing runs, nothing outside is written.

Images outside a data set's folder are in test_datasets.py, bombs in test_letterbox.py, text in pages in
test_cli.py too.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from surgvqa import checkpoint, cli, hub, lock, model, recipe, slurm
from surgvqa.audit import load_and_audit
from surgvqa.lock import Lock
from surgvqa.recipe import BadInput
from surgvqa.run import claim, clear, resumable
from surgvqa.terminal import Console
from surgvqa.tokens import ChatTokens

ROOT = Path(__file__).parents[1]
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e[/b][bold]"
"""Sets a terminal's title, clears it, turns the writing; and rich's markup, closed before it is opened."""
RECIPE = """
model: {name: model}
data: {format: jsonl, path: data/questions.jsonl}
image: {size: 64}
batch: {questions: 8, questions_per_image: 4, tokens_per_micro_batch: 600}
train: {max_steps: 2, precision: fp32}
eval: {max_new_tokens: 2}
output: run
"""


class Runs:
    """What unpickling would do: make the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


class Place:
    """A working folder with a model, data, a recipe and a finished run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "CANARY"
        self.model, self.run = folder / "model", folder / "run"
        self.saved = self.run / "checkpoints" / "step-000002"

    def code(self, name: str) -> None:
        """A module that makes the canary where it is imported; the working folder is on the path."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"open({str(self.canary)!r}, 'w').close()\nclass X: pass\ndef generate(*a): pass\n")

    def pickle(self, file: Path) -> None:
        file.write_bytes(pickle.dumps(Runs(self.canary)))

    def set(self, file: Path, **keys: object) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    def sign(self) -> None:
        """A manifest that agrees with what the checkpoint now holds."""
        (self.saved / "trainer/manifest.json").unlink()
        checkpoint.write_json(self.saved / "trainer/manifest.json", checkpoint._manifest(self.saved))

    def outside(self) -> dict[str, tuple[int, str]]:
        """Every file but the run's and Python's caches."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if name.parts[0] != "run" and "__pycache__" not in name.parts:
                plain = path.is_file() and not path.is_symlink() and path.stat().st_size < 1e8
                digest = hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""
                found[str(name)] = (path.lstat().st_mode, digest)
        return found

    def start(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The program as a user starts it, in this folder."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        with self.unharmed():
            done = subprocess.run(
                [sys.executable, "-m", "surgvqa.cli", *words],
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=240,
            )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        plain(done.stdout + done.stderr)
        return done

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """Nothing runs, and nothing outside the run's folder changes."""
        before = self.outside()
        yield
        assert not self.canary.exists()
        assert self.outside() == before


def plain(text: str) -> None:
    """No control characters but line breaks and tabs."""
    assert not recipe._CONTROL.search(text.replace("\n", "").replace("\t", ""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("place"))
    write_jsonl(place.folder / "data", images=8)
    shutil.copytree(hub.find("tiny-qwen3-vl").path, place.model)
    model.build(hub.find("tiny-qwen3-vl")).save_pretrained(place.folder / "saved")
    shutil.move(place.folder / "saved" / "model.safetensors", place.model)
    shutil.rmtree(place.folder / "saved")
    (place.folder / "recipe.yaml").write_text(RECIPE)
    done = place.start("train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def place(finished: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy to spoil."""
    copy = Place(Path(shutil.copytree(finished.folder, tmp_path / "place")))
    monkeypatch.chdir(copy.folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return copy


# ---- code --------------------------------------------------------------------------------------------


def test_code_of_a_model_folder_is_not_run(place: Place) -> None:
    """Whatever can name code: the model trains as if nothing did, and asks nothing."""
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        names = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor")
        mapped: dict[str, object] = {**dict.fromkeys(names, "evil.X"), "AutoTokenizer": ["evil.X", "evil.X"]}
        place.set(place.model / file, auto_map=mapped)
    place.code("model/evil.py")
    place.code("model/custom_generate/generate.py")
    # A hub repository whose code transformers would fetch.
    vision = json.loads((place.model / "config.json").read_text())["vision_config"]
    vision["attn_implementation"] = vision["_attn_implementation"] = "evil/kernel"
    place.set(place.model / "config.json", vision_config=vision, attn_implementation="evil/kernel")
    place.pickle(place.model / "pytorch_model.bin")
    assert place.start("check", "recipe.yaml", "--out", "run/audit").returncode == 0
    assert place.start("train", "recipe.yaml", "--fresh", "--yes").returncode == 0


def test_code_that_adapters_name_is_not_run(place: Place) -> None:
    """PEFT imports what `megatron_core` names; surgvqa reads the weights alone."""
    place.code("megatron/evil.py")
    file = place.saved / "adapter_config.json"
    place.set(file, megatron_config={"x": 1}, megatron_core="megatron.evil", base_model_name_or_path="evil")
    place.sign()
    assert place.start("evaluate", "run").returncode == 0


def test_a_pickle_in_a_checkpoint_is_refused(place: Place) -> None:
    (place.saved / "adapter_model.safetensors").unlink()
    place.pickle(place.saved / "adapter_model.bin")  # where PEFT would look next
    place.pickle(place.saved / "optimizer.pt")
    place.sign()
    done = place.start("evaluate", "run")
    assert done.returncode == 2
    assert "adapter_model.bin: could run code when it is read" in done.stderr
    assert "optimizer.pt: could run code when it is read" in done.stderr


def _weights_elsewhere(place: Place, name: str) -> None:
    (place.model / "model.safetensors").unlink()
    place.pickle(place.model / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapters(place: Place) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "evil/other"}
    (place.model / "adapter_config.json").write_text(json.dumps(config))


def _pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


Spoil = Callable[[Place], object]

MODELS: dict[str, tuple[Spoil, str]] = {
    "pickled weights": (lambda p: _weights_elsewhere(p, "pytorch_model.bin"), "safetensors beside it"),
    "weights elsewhere": (lambda p: _weights_elsewhere(p, "../x.safetensors"), "safetensors beside it"),
    "adapters": (_adapters, "holds adapters"),
    "quantized": (
        lambda p: p.set(p.model / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "has a quantization_config",
    ),
    "a list": (lambda p: p.set(p.model / "config.json", vision_config=[1]), "not laid out like Qwen3-VL's"),
    "no side": (
        lambda p: p.set(p.model / "config.json", vision_config={"patch_size": 0}), "patch_size 0",
    ),
    "tokens": (lambda p: p.set(p.model / "tokenizer.json", added_tokens=[1]), "not laid out like"),
    "brackets": (lambda p: (p.model / "config.json").write_text("[" * 100_000), "not a model folder"),
    "a pipe": (lambda p: _pipe(p.model / "config.json"), "is not a file"),
    "sandbox": (
        lambda p: (p.model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"), "SecurityError",
    ),
    "template": (lambda p: (p.model / "chat_template.json").write_text("{}"), "cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_is_refused(place: Place, name: str) -> None:
    spoil, said = MODELS[name]
    spoil(place)
    with pytest.raises(BadInput, match=said):
        ChatTokens(hub.find(str(place.model)))
    assert not place.canary.exists()


def test_weights_of_a_whole_checkpoint_are_looked_at_too(place: Place) -> None:
    _adapters(place)
    with pytest.raises(BadInput, match="holds adapters"):
        model.build(hub.find("tiny-qwen3-vl"), weights=place.model)


def test_nothing_trusts_remote_code_or_reads_pickles() -> None:
    for file in sorted((ROOT / "surgvqa").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", file
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert names.isdisjoint({"pickle", "dill", "joblib", "cloudpickle", "marshal"}), file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "os.system",
                    "torch.load",
                    "np.load",
                    "yaml.unsafe_load",
                ), file
                assert not any(key.arg == "shell" for key in node.keywords), file


# ---- recipes -----------------------------------------------------------------------------------------

GOOD = "model: {name: a/b}\ndata: {format: demo}\nimage: {size: 64}\noutput: x\n"

RECIPES = {
    "!!python/object/apply:os.system ['touch CANARY']": "tags (tag:yaml.org,2002:python/object/apply",
    GOOD + "train: {seed: !!python/name:os.system }": "tags (",
    GOOD + "train: {lr: !!float x}": "tags (",
    GOOD + "train: {compile: !!bool x}": "tags (",
    GOOD + "prompt: {system: !!timestamp 9999-99-99}": "tags (",
    GOOD + f"train: {{seed: {'9' * 5000}}}": "not valid YAML",
    GOOD + "<<: {output: /etc}": "<<: unknown key",
    GOOD.replace("output: x", 'output: "a\\nb"'): "output: holds a control character",
    GOOD.replace("a/b", '"a\\0b"'): "model.name: holds a control character",
    GOOD.replace("demo", 'jsonl, path: "\\e[2J"'): "data.path: holds a control character",
}


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_a_recipe_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        recipe.parse(text)
    assert RECIPES[text] in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_override_is_refused() -> None:
    for value in ("!!python/object/apply:os.system [id]", "9" * 5000, "&a [*a]"):
        with pytest.raises(BadInput, match="not a YAML value"):
            recipe.parse(GOOD, [f"output={value}"])


def test_check_of_a_hostile_recipe(place: Place) -> None:
    (place.folder / "evil.yaml").write_text(
        RECIPE + f"prompt: {{system: !!python/object/apply:os.system ['touch {place.canary}']}}\n"
    )
    done = place.start("check", "evil.yaml", "--out", "run/audit", f"output=$(touch {place.canary})")
    assert done.returncode == 2
    assert "are not allowed" in done.stderr


def test_a_recipe_does_not_choose_what_is_written(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo is drawn in the cache alone; a folder with other things in it is no run's."""
    with place.unharmed():
        assert (
            cli.main(["check", "recipe.yaml", "data={format: demo, path: elsewhere}", "--out", "run/audit"])
            == 2
        )
        assert cli.main(["train", "recipe.yaml", "output=.", "--fresh", "--yes"]) == 2
    said = capsys.readouterr().err
    assert "no such file or folder" in said
    assert "holds other things (data, model, recipe.yaml, ...) and no run" in said


def test_words_for_slurm_stay_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to sbatch as they are, without a shell, behind options of ours or the script's name."""
    monkeypatch.chdir(ROOT)
    hostile = "runs/$(touch x); --wrap=id `id`"
    words = ["recipes/demo.yaml", f"output={hostile}", "prompt.system=--export=ALL", "--array-seeds", "2"]
    given: list[list[str]] = []

    def submit(each: slurm.Submission) -> str:
        given.append(each.command())
        return "1"

    monkeypatch.setattr(slurm, "_submit", submit)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert slurm.submit(words) == 0
    script = given[0].index("slurm/train.sbatch")
    assert f"--comment={hostile}-seed%a" in given[0][:script]
    assert f"output={hostile}" in given[0][script:]
    assert not any(word.startswith("--wrap") for word in given[0])


def test_a_jobs_scratch_is_new_and_its_users_alone(tmp_path: Path) -> None:
    """Nobody can have put compiled kernels where a job of a known number will look for them."""
    programs, scratch = tmp_path / "bin", tmp_path / "not" / "there"
    programs.mkdir()
    scripts = {
        "srun": 'while [[ $1 != bash ]]; do shift; done; exec "$@"',
        "accelerate": 'stat -c "%a %n" "$TMPDIR"; echo "$TRITON_CACHE_DIR"',
        "scontrol": "echo here",
        "nvidia-smi": "exit 1",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    given = {"JOB_ID": "7", "JOB_NUM_NODES": "1", "NODEID": "0", "JOB_NODELIST": "here"}
    done = subprocess.run(
        ["bash", "-c", f"cd {tmp_path}; source slurm/launch.sh; launch surgvqa.train"],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SURGVQA_SCRATCH": str(scratch)}
        | {f"SLURM_{name}": value for name, value in given.items()},
        cwd=shutil.copytree(ROOT / "slurm", tmp_path / "slurm").parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    mode, folder = done.stdout.splitlines()[-2].split()
    assert (mode, Path(folder).parent) == ("700", scratch)
    assert re.fullmatch(r"surgvqa-7-0\.\w{6}", Path(folder).name)
    assert done.stdout.splitlines()[-1] == f"{folder}/triton"
    assert not Path(folder).exists()


# ---- checkpoints and run folders ---------------------------------------------------------------------


def _manifest_elsewhere(place: Place) -> None:
    place.set(
        place.saved / "trainer/manifest.json", **{"../../../data/questions.jsonl": {"size": 1, "sha256": ""}}
    )


def _link(file: Path, target: Path) -> None:
    if file.is_dir():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.symlink_to(target)


CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "outside": (_manifest_elsewhere, "is not in the checkpoint's folder"),
    "absolute": (
        lambda p: p.set(p.saved / "trainer/manifest.json", **{"/etc/hostname": {"size": 1, "sha256": ""}}),
        "is not in the checkpoint's folder",
    ),
    "a link": (
        lambda p: _link(p.saved / "trainer/state.json", p.folder / "x"),
        "is a link, a pipe or a device",
    ),
    "a pipe": (lambda p: _pipe(p.saved / "trainer/recipe.yaml"), "is a link, a pipe or a device"),
    "endless": (
        lambda p: (p.saved / "trainer/manifest.json").write_text('{"x": {"size": 1e999}}'),
        "unreadable",
    ),
    "brackets": (lambda p: (p.saved / "trainer/manifest.json").write_text("[" * 100_000), "unreadable"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_refused(place: Place, name: str) -> None:
    spoil, said = CHECKPOINTS[name]
    spoil(place)
    assert any(said in problem for problem in checkpoint.verify(place.saved))


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": -5, "data": {}, "skipped": 0, "settled": true}',
                                   '{"step": "2", "data": "", "skipped": 1e999, "settled": 3}'])  # fmt: skip
def test_a_state_of_other_types_is_refused(place: Place, state: str) -> None:
    (place.saved / "trainer/state.json").write_text(state)
    place.sign()
    with pytest.raises(BadInput, match=r"state\.json: (not a checkpoint's state|says step -5)"):
        resumable(place.saved, recipe.load("recipe.yaml"), {})


def test_another_models_adapters_and_optimizer_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"evil|exp_avg": torch.zeros(3)}, place.saved / "trainer/optimizer.safetensors")
    place.sign()
    more = ["train", "recipe.yaml", "train.max_steps=3", "--accept-changes"]
    assert cli.main(more) == 2
    assert "its optimizer is that of another model" in capsys.readouterr().err
    save_file({"evil.lora_A.weight": torch.zeros(3)}, place.saved / "adapter_model.safetensors")
    place.sign()
    assert cli.main(more) == 2
    assert "not the adapters of this recipe" in capsys.readouterr().err


LEADS_OUT = {
    "checkpoints": "a link out", "tensorboard": "a link out", "metrics.jsonl": "a link out",
    "checkpoints/.tmp-x": "a link out", "checkpoints/step-000002": "a link out", ".lock": "a link out",
    "pipe": "is a pipe", "checkpoints/step-000002/x": "is a pipe",
}  # fmt: skip


@pytest.mark.parametrize("name", LEADS_OUT)
def test_a_run_folder_that_leads_out_is_refused(place: Place, name: str) -> None:
    victim = place.folder / "victim"
    victim.mkdir()
    (victim / "step-000001").mkdir()
    (victim / "step-000001" / "manifest.json").write_text("{}")
    if "pipe" in LEADS_OUT[name]:
        os.mkfifo(place.run / name)
    else:
        _link(place.run / name, victim)
    before = place.outside()
    with pytest.raises(BadInput, match=LEADS_OUT[name]):
        claim(place.run)
    clear(place.run)
    if name != "checkpoints":
        assert place.outside() == before


def test_a_run_may_be_a_link_and_hold_links_to_itself(place: Place) -> None:
    place.run.rename(place.folder / "far")
    place.run.symlink_to(place.folder / "far")
    (place.run / "best").symlink_to("checkpoints/step-000002")
    claim(place.run).release()


def test_starting_over_deletes_only_what_a_run_writes(place: Place) -> None:
    for name in ("checkpoints/mine/weights", "tensorboard/notes", "profile/notes", "notes"):
        (place.run / name).parent.mkdir(exist_ok=True)
        (place.run / name).write_text("mine")
    clear(place.run)
    left = {str(path.relative_to(place.run)) for path in place.run.rglob("*") if path.is_file()}
    assert left == {"checkpoints/mine/weights", "tensorboard/notes", "profile/notes", "notes"}


def test_links_in_the_place_of_temporary_files_are_not_followed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = place.folder / "victim"
    victim.write_text("mine")
    (place.run / ".scores.json.tmp").symlink_to(victim)
    checkpoint.write_text(place.run / "scores.json", "{}")
    names = uuid.UUID(int=1), uuid.UUID(int=2)
    (place.run / f".lock.{names[0].hex}").symlink_to(victim)
    monkeypatch.setattr("surgvqa.lock.uuid.uuid4", iter(names).__next__)
    with pytest.raises(FileExistsError):
        Lock(place.run)
    Lock(place.run).release()
    assert victim.read_text() == "mine"
    assert (place.run / "scores.json").read_text() == "{}"


LOCKS = [
    "[]", '{"host": 3}', '{"place": PLACE, "pid": "a\\u0000b", "started": "x"}',
    '{"place": PLACE, "pid": 1e999, "started": [1]}', "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("content", LOCKS, ids=range(len(LOCKS)))
def test_a_lock_of_nonsense_is_taken_over(
    place: Place, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgvqa.lock.WATCHED_FOR", 0.1)
    (place.run / ".lock").write_text(content.replace("PLACE", json.dumps(lock._place())))
    claim(place.run).release()


def test_status_of_a_hostile_run(place: Place) -> None:
    """Numbers that are none, endless brackets, pipes and escapes: a line all the same."""
    run = place.run
    (run / "ended.json").write_text(json.dumps({"name": ESCAPE}))
    (run / "scores.json").write_text(json.dumps({"split": ESCAPE, "overall": {"exact": 0.5}}))
    (run / "eval.jsonl").write_text(f'{{"exact": {10**400}}}\n[1]\n{"[" * 100_000}\n')
    rows = (
        '{"step": 1e308, "epoch": 1e-308, "seconds": 1e308}\n{"step": 3, "epoch": 1e-308, "seconds": 1e14}\n'
    )
    (run / "metrics.jsonl").write_text(rows)
    pid = os.getpid()
    owner = {"host": "x", "pid": pid, "place": lock._place(), "started": lock._started(pid), "job": ESCAPE}
    (run / ".lock").write_text(json.dumps(owner))
    os.utime(run / ".lock", (1, 1))  # its age does not make it seem alive
    (run / "recipe.yaml").write_text(f"a: {'9' * 5000}")
    done = place.start("status", "run")
    assert done.returncode == 0
    assert "running" in done.stdout
    assert "\\x1b]0;" in done.stdout
    for name in (".lock", "metrics.jsonl", "ended.json", "recipe.yaml"):
        _pipe(run / name)
    assert place.start("status", "run").returncode == 0


def test_pipes_are_not_waited_for_by_compare(place: Place) -> None:
    """Of a run that was evaluated, its scores and then its predictions are pipes."""
    line = '{"id": "1", "image": "i", "group": "", "question": "Q", "question_type": "t", '
    (place.run / "predictions.jsonl").write_text(f'{line}"references": ["a"], "answer": "a"}}\n')
    _pipe(place.run / "scores.json")
    assert place.start("compare", "run", "run", "--out", "run/compared").returncode == 0
    _pipe(place.run / "predictions.jsonl")
    done = place.start("compare", "run", "run")
    assert done.returncode == 2
    assert "holds no predictions" in done.stderr


# ---- data --------------------------------------------------------------------------------------------


def test_escapes_in_data_are_shown_as_text(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    data = place.folder / "data" / "questions.jsonl"
    hostile = json.dumps(ESCAPE)[1:-1]
    text = data.read_text().replace("Is there bleeding?", hostile).replace('"yes_no"', f'"{hostile}"')
    data.write_text(text.replace('"answer": "yes"', f'"answer": "{hostile}"'))
    assert cli.main(["train", "recipe.yaml", "--fresh", "--yes", "loss.class_weights=inverse"]) == 0
    assert cli.main(["show", "recipe.yaml", "--out", "run/show"]) == 0
    data.write_text(text.replace('"0.png"', f'"{hostile}.png"'))
    assert cli.main(["check", "recipe.yaml", "--out", "run/audit"]) == 2
    said = capfd.readouterr()
    plain(said.out + said.err)
    assert said.out.count("\\x1b]") > 2
    assert f"{hostile}.png' does not exist".split("]")[-1] in said.out


def test_images_that_would_fill_the_memory_are_refused(place: Place) -> None:
    with (place.folder / "data" / "0.png").open("r+b") as file:
        file.truncate(200 * 2**30)  # a hole: nothing on the disk
    text = PngInfo()
    text.add_text("note", "x" * 200_000_000, zip=True)
    Image.new("RGB", (9, 9)).save(place.folder / "data" / "1.png", pnginfo=text)
    _, found = load_and_audit(recipe.load("recipe.yaml"))
    said = {problem.place: problem.what for problem in found.problems}
    assert "is larger than 1 GiB" in said["image 0.png"]
    assert "image 1.png" in said


def test_texts_are_no_markup_on_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print(f"a {ESCAPE} :smile: b")
    assert capsys.readouterr().out == "a \\x1b]0;owned\\x1b[2J\\u202e[/b][bold] :smile: b\n"


# ---- pages -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_page_runs_nothing_in_a_browser(place: Place) -> None:
    """The page says a hostile question as text; and where escaping had failed, its policy would hold."""
    hostile = "<script>document.title='owned'</script><img src=x onerror=\\\"document.title='owned'\\\">"
    data = place.folder / "data" / "questions.jsonl"
    data.write_text("".join(
        line.replace("How many polyps are there?", hostile) if '"2.png"' in line else line
        for line in data.read_text().splitlines(keepends=True)
    ))  # fmt: skip
    Image.new("RGB", (64, 64), (255, 0, 0)).save(place.folder / "data" / "2.png")
    assert cli.main(["show", "recipe.yaml", "--index", "2", "--out", "run/show"]) == 0
    page = place.run / "show" / "tree.html"

    def browser(*words: str) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options += [f"--user-data-dir={place.folder / 'profile'}", *words, page.as_uri()]
        return subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120).stdout

    assert "<title>What the model sees</title>" in browser("--dump-dom")
    browser(f"--screenshot={place.folder / 'page.png'}")
    shown = Image.open(place.folder / "page.png").convert("RGB")
    assert (255, 0, 0) in {colour for _, colour in shown.getcolors(2**24)}  # type: ignore[union-attr, misc]
    page.write_text(page.read_text().replace("<h1>", hostile.replace("\\", "") + "<h1>"))
    dom = browser("--dump-dom")
    assert "<script>" in dom
    assert "<title>What the model sees</title>" in dom


# ---- known vulnerabilities ---------------------------------------------------------------------------


def _package(name: str, *found: list[str]) -> dict[str, object]:
    return {"name": name, "version": "1", "vulns": [{"id": "A-1", "fix_versions": fixed} for fixed in found]}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([_package("a"), _package("b")], 0, "audited 2 of 2 packages: 0 found"),
        ([_package("a", ["2"]), _package("b", [])], 1, "a 1: A-1; mended in 2"),
        ([_package("b", [])], 0, "b 1: A-1; no version mends it yet"),
        (
            [_package("a"), {"name": "c", "skip_reason": "x"}],
            0,
            "audited 1 of 2 packages: 0 found; not known there: c",
        ),
        ([{"name": "c", "skip_reason": "x"}], 0, "not audited: the data has none of the 1 packages"),
    ],
)
def test_what_is_said_of_known_vulnerabilities(packages: list[dict[str, Any]], code: int, said: str) -> None:
    source = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert source
    assert source.loader
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    lines, found = module.verdict({"dependencies": packages})
    assert (found, said in lines) == (code, True), lines


def test_every_claim_names_a_test_that_is_there() -> None:
    tests = {
        f"{file.name}::{node.name}"
        for file in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+\.py::\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    assert named <= tests, named - tests
