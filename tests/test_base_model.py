"""The base model of a run: a change of it is noticed, and its prompts are those of the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, write_jsonl
from safetensors.torch import load_file, save_file

import surgvqa
from surgvqa import checkpoint, cli, digests, hub, model, recipe, train
from surgvqa.recipe import BadInput

RECIPE = """
model: {{name: {folder}, tune: lora, lora: {{rank: 4, alpha: 8}}}}
data: {{format: jsonl, path: {data}, workers: 0}}
image: {{size: 64}}
batch: {{questions: 6, questions_per_image: 3}}
train: {{max_steps: 6, lr: 1.0e-2, precision: fp32, checkpoint_layers: 0}}
eval: {{final: test, max_new_tokens: 4}}
checkpoint: {{every: 2, keep: 9}}
log: {{trace: true}}
output: {run}
"""


def make_base(name: str, folder: Path) -> Path:
    """Write a tiny model with weights, as a folder that a user has."""
    source = hub.find(name)
    shutil.copytree(source.path, folder)
    state = model.build(source, seed=1).state_dict()
    del state["lm_head.weight"]  # tied
    weights = {key: value.contiguous() for key, value in state.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Experiment:
    """A base model in a folder, data, and a finished LoRA run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.run = folder, folder / "base", folder / "run"
        self.file = folder / "recipe.yaml"

    def start(self, *words: str) -> Path:
        return train.train(recipe.load(self.file, words))

    def command(self, *words: str) -> int:
        return cli.main([words[0], str(self.file if words[0] == "train" else self.run), *words[1:]])

    def losses(self) -> list[str]:
        return [json.loads(line)["loss"] for line in (self.run / "trace.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    made = Experiment(tmp_path_factory.mktemp("experiment"))
    make_base(request.param, made.base)
    data = write_jsonl(made.folder / "data", images=10)
    made.file.write_text(RECIPE.format(folder=made.base, data=data, run=made.run))
    made.start()
    return made


@pytest.fixture
def experiment(finished: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """A copy to spoil; its recipe still names the places of the original, which `in_place` moves."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(finished.folder, tmp_path / "copy")
    copy = Experiment(tmp_path / "copy")
    for file in [copy.file, copy.run / "recipe.yaml"]:
        file.write_text(file.read_text().replace(str(finished.folder), str(copy.folder)))
    for _, folder in checkpoint.steps(copy.run / "checkpoints"):
        file = folder / checkpoint.RECIPE
        file.write_text(file.read_text().replace(str(finished.folder), str(copy.folder)))
        manifest = folder / checkpoint.MANIFEST
        manifest.unlink()
        checkpoint.write_json(manifest, checkpoint._manifest(folder))
    return copy


def _weights(base: Path) -> None:
    file = base / "model.safetensors"
    save_file({key: value + 0.3 * torch.randn_like(value) for key, value in load_file(file).items()}, file,
              metadata={"format": "pt"})  # fmt: skip


def _one_weight(base: Path) -> None:
    file = base / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _set(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def _template(base: Path) -> None:
    file = base / "chat_template.json"
    text = json.loads(file.read_text())["chat_template"]
    _set(file, chat_template="{{- '<|im_start|>system\\nYou are rude.<|im_end|>\\n' }}" + text)


def _jinja(base: Path) -> None:
    (base / "chat_template.jinja").write_text(
        json.loads((base / "chat_template.json").read_text())["chat_template"] + " "
    )


def _end_of_line(base: Path) -> None:
    (base / "chat_template.jinja").write_text(
        json.loads((base / "chat_template.json").read_text())["chat_template"] + "\n"
    )


def _tokenizer(base: Path) -> None:
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-50]
    file.write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (_weights, r"weights: model\.safetensors changed"),
    "a bit of the weights": (_one_weight, r"weights: model\.safetensors changed"),
    "template": (_template, r"chat template: line 1, character \d+: .* → .*You are rude"),
    "template in another file": (_jinja, r"chat template: line \d+, character \d+: \"\" → \" \""),
    "template by its last line's end": (
        _end_of_line,
        r"chat template: line \d+, character \d+: \"\" → \"\\n\"",
    ),
    "tokenizer": (_tokenizer, r"tokenizer: tokenizer\.json changed"),
    "processor": (
        lambda base: _set(base / "preprocessor_config.json", image_mean=[0.25, 0.25, 0.25]),
        r"image processor: image_mean \[.*\] → \[0\.25, 0\.25, 0\.25\]",
    ),
    "config": (lambda base: _set(base / "config.json", rms_norm_eps=0.1), r"config: rms_norm_eps .* → 0\.1"),
    "config by a null": (lambda base: _set(base / "config.json", unheard_of=None), r"config: changed"),
}


def answers(run: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (run / "predictions.jsonl").open(encoding="utf-8")]


@pytest.mark.fault("F32")
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_base_model_is_refused_with_the_difference(
    experiment: Experiment, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, said = CHANGES[name]
    before = answers(experiment.run)
    change(experiment.base)
    second = f"{experiment.run}-second"
    commands: list[Callable[[], object]] = [
        lambda: surgvqa.evaluate(experiment.run),
        lambda: surgvqa.load_predictor(experiment.run / "checkpoints/step-000006"),
        lambda: experiment.start("train.max_steps=8", "train.schedule=constant"),
        lambda: experiment.start(f"model.adapter={experiment.run}", f"output={second}"),
    ]
    for command in commands:
        with pytest.raises(BadInput, match=rf"step-000006 was trained on a base model that .*\n?.*{said}"):
            command()
    for step in ("1", "3"):
        assert experiment.command("train", "--replay", step) == 2
    assert experiment.command("evaluate") == 2
    assert answers(experiment.run) == before
    assert not list(Path(second).glob("checkpoints/*"))

    assert experiment.command("evaluate", "--accept-changes") == 0
    (line,) = json.loads((experiment.run / "scores.json").read_text())["accepted_changes"]
    capsys.readouterr()
    if name not in ("weights", "a bit of the weights", "config"):
        assert answers(experiment.run) == before, "prompts are the checkpoint's own"
    assert experiment.command("train", "train.max_steps=7", "--accept-changes") == 0
    recorded = json.loads((experiment.run / "changes.jsonl").read_text())
    assert recorded["changes"] == ["train.max_steps: 6 → 7", line]
    kept = experiment.run / "checkpoints"
    for file in hub.processor_files(hub.find(str(experiment.base))):
        if file != "config.json" and (kept / "step-000006" / file).exists():
            assert (kept / "step-000007" / file).read_bytes() == (kept / "step-000006" / file).read_bytes()
    # What was accepted is what the run now has: nothing is asked again.
    assert experiment.command("train", "train.max_steps=7") == 0


@pytest.mark.fault("F32")
def test_a_base_model_with_other_patches_is_never_accepted(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint's own image processor does not fit it."""
    config = json.loads((experiment.base / "config.json").read_text())
    other = make_base(*(name for name in FAMILIES if config["model_type"] not in name.replace("-", "_")),
                      experiment.folder / "other")  # fmt: skip
    for command in ("train", "evaluate"):
        assert experiment.command(command, f"model.name={other}", "train.max_steps=7") == 2
        assert "does not hold any more" in capsys.readouterr().err
        words = (f"model.name={other}", "train.max_steps=7", "--accept-changes")
        assert experiment.command(command, *words) == 2
        assert "patch_size of the image processor in " in capsys.readouterr().err


@pytest.mark.fault("F32")
def test_the_same_bytes_elsewhere_are_the_same_model(experiment: Experiment) -> None:
    before = answers(experiment.run)
    moved = experiment.folder / "moved"
    experiment.base.rename(moved)
    # As transformers 5 would write the same: the template in a file of its own, the processor in another.
    template = json.loads((moved / "chat_template.json").read_text())["chat_template"]
    (moved / "chat_template.json").unlink()
    (moved / "chat_template.jinja").write_text(template)
    settings = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").unlink()
    (moved / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(BadInput, match="neither a folder here nor a hub id"):
        surgvqa.evaluate(experiment.run)
    surgvqa.evaluate(experiment.run, overrides=[f"model.name={moved}"])
    assert answers(experiment.run) == before
    experiment.start(f"model.name={moved}")
    assert not (experiment.run / "changes.jsonl").exists()


@pytest.mark.fault("F32")
def test_a_resumed_run_is_bit_for_bit_and_its_prompts_survive_a_change(experiment: Experiment) -> None:
    """Also where the checkpoint that it goes on from, whose tokenizer it reads, is deleted on the way."""
    whole = experiment.losses()
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(experiment.run / "checkpoints" / name)
    words = ["checkpoint.every=1", "checkpoint.keep=2"]
    _template(experiment.base)
    with pytest.raises(BadInput, match="chat template"):
        experiment.start(*words)
    train.train(recipe.load(experiment.file, words), accept_changes=True)
    assert experiment.losses() == whole
    _, (_, last) = checkpoint.steps(experiment.run / "checkpoints")
    assert last.name == "step-000006"
    assert "rude" not in hub.chat_template(last, "")


@pytest.mark.fault("F32")
def test_a_whole_model_needs_its_base_no_more(experiment: Experiment) -> None:
    words = [f"model={{name: {experiment.base}, tune: full}}", f"output={experiment.folder / 'full'}"]
    run = experiment.start(*words)
    before = answers(run)
    recorded = checkpoint.base_of(run / "checkpoints/step-000006")
    assert recorded == digests.of(hub.find(str(experiment.base)))
    shutil.rmtree(experiment.base)
    surgvqa.evaluate(run)
    assert answers(run) == before
    predictor = surgvqa.load_predictor(run)
    image = next((experiment.folder / "data").glob("*.png"))
    assert isinstance(predictor.ask(image, "Is there bleeding?").text, str)
    shutil.rmtree(run / "checkpoints/step-000006")
    experiment.start(*words)
    assert answers(run) == before
    assert checkpoint.base_of(run / "checkpoints/step-000006") == recorded
    second = experiment.start(*words, f"model.adapter={run}", f"output={run}-second", "train.max_steps=1")
    assert checkpoint.base_of(second / "checkpoints/step-000001") == recorded
    with pytest.raises(BadInput, match="neither a folder here nor a hub id"):
        experiment.start(*words, f"model.name={experiment.folder / 'other'}", "train.max_steps=8")


def hub_snapshot(cache: Path, name: str, commit: str, source: Path, branch: str | None = "main") -> None:
    """Lay a model folder out as huggingface_hub does: blobs, snapshots that link to them, refs."""
    root = cache / f"models--{name.replace('/', '--')}"
    for file in source.iterdir():
        blob = root / "blobs" / f"{commit[:4]}-{file.name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = root / "snapshots" / commit / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../blobs/{blob.name}")
    if branch:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / branch).write_text(commit)


@pytest.mark.fault("F32")
def test_the_commit_of_a_hub_id_is_recorded_and_used_again(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    first, second = "a1" * 20, "b2" * 20
    hub_snapshot(cache, "surgical/base", first, experiment.base)
    words = ["model.name=surgical/base", f"output={experiment.folder / 'of-hub'}"]
    run = experiment.start(*words)
    before = answers(run)
    folder = run / "checkpoints/step-000006"
    assert checkpoint.base_of(folder).commit == first
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == first
    scores = json.loads((run / "scores.json").read_text())
    assert scores["model"]["revision"] == first

    _weights(experiment.base)
    hub_snapshot(cache, "surgical/base", second, experiment.base)
    assert hub.find("surgical/base").commit == second
    surgvqa.evaluate(run)
    assert answers(run) == before
    assert surgvqa.load_predictor(run).recipe.model.revision is None
    shutil.rmtree(folder)
    experiment.start(*words)
    assert answers(run) == before
    assert checkpoint.base_of(folder).commit == first
    with pytest.raises(BadInput, match=rf"model.name: .* → 'surgical/base' at {second}[^$]*weights: "):
        surgvqa.evaluate(run, overrides=[f"model.revision={second}"])
    fresh = experiment.start(*words, f"output={run}-fresh")
    assert checkpoint.base_of(fresh / "checkpoints/step-000006").commit == second


@pytest.mark.fault("F32")
def test_published_models_are_not_mixed_in_one_folder(experiment: Experiment) -> None:
    out = experiment.folder / "out"
    words = ["evaluate", str(experiment.base), "--recipe", str(experiment.file), "--out", str(out)]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    _weights(experiment.base)
    with pytest.raises(BadInput, match="the weights are not those of the published model"):
        surgvqa.evaluate(experiment.base, recipe=experiment.file, output=out)


def test_a_large_file_is_sampled_in_every_tensor_and_read_whole_by_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_WHOLE", 1000)
    monkeypatch.setattr(digests, "_BLOCK", 64)
    base = make_base(FAMILIES[1], tmp_path / "base")
    file = base / "model.safetensors"
    content = file.read_bytes()

    def now(whole: bool = False) -> dict[str, str]:
        return digests.of(hub.find(str(base)), whole=whole).weights

    before, before_whole = now(), now(whole=True)
    assert before["model.safetensors"].startswith("sampled:")
    assert before_whole["model.safetensors"] == f"sha256:{digests.sha256(file)}"
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        start, end = tensor["data_offsets"]
        middle = 8 + length + (start + end) // 2
        changed = bytearray(content)
        changed[middle - 1] ^= 1
        file.write_bytes(changed)
        assert now() != before, name
    edge = bytearray(content)
    edge[-1] ^= 1
    file.write_bytes(edge)
    assert now(whole=True) != before_whole
    file.write_bytes(content + b"x")
    assert now() != before
    file.write_bytes(b"no safetensors at all" * 100)
    with pytest.raises(BadInput, match="weights cannot be read"):
        now()


def test_check_hashes_all_of_the_weights(
    experiment: Experiment,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digests, "_WHOLE", 1000)
    words = ["--out", str(tmp_path / "audit")]

    def check(*more: str) -> Any:
        assert cli.main(["check", str(experiment.file), *words, *more]) == 0
        assert f"model: {more[0].split('=')[1] if more else experiment.base}; SHA-256 of its weights" in (
            capsys.readouterr().out.replace("\n", "")
        )
        return json.loads((tmp_path / "audit/recipe/audit.json").read_text())["model"]["digests"]["weights"]

    expected = f"sha256:{digests.sha256(experiment.base / 'model.safetensors')}"
    assert check() == {"model.safetensors": expected}
    words_full = [f"model={{name: {experiment.base}, tune: full}}", f"output={experiment.folder / 'full'}"]
    full = experiment.start(*words_full) / "checkpoints/step-000006"
    expected = f"sha256:{digests.sha256(full / 'model.safetensors')}"
    monkeypatch.setattr(digests, "sha256", lambda file: "read" if file.suffix == ".safetensors" else "")
    assert check(f"model.name={full}") == {"model.safetensors": expected}, "by the manifest"
