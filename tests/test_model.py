"""Models: the right parts counted and trained, real folders loaded whole, broken ones refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from surgvqa import hub, model
from surgvqa.recipe import BadInput, Lora

TOTALS = {
    "Qwen2-VL-7B-Instruct": {
        "vision": 631_183_360, "merger": 44_575_744, "language": 7_070_619_136, "lm_head": 544_997_376,
    },
    "Qwen3-VL-8B-Instruct": {
        "vision": 415_891_440, "merger": 40_119_040, "deepstack": 120_377_856,
        "language": 7_568_405_504, "lm_head": 622_329_856,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_of_the_real_models_by_part(shared: Path, name: str) -> None:
    network = model.skeleton(hub.find(str(shared / "qwen" / name)))
    assert {part: total for part, (total, _) in model.count(network).items()} == TOTALS[name]


@pytest.mark.parametrize(("name", "layers"), [("Qwen2-VL-7B-Instruct", 28), ("Qwen3-VL-8B-Instruct", 36)])
def test_lora_on_the_real_models_adapts_the_language_model_alone(
    shared: Path, name: str, layers: int
) -> None:
    targets = model.lora_targets(model.skeleton(hub.find(str(shared / "qwen" / name))), Lora().modules)
    assert len(targets) == 7 * layers
    assert all(target.startswith("model.language_model.layers.") for target in targets)


@pytest.mark.parametrize("name", hub.TINY_MODELS)
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("train_merger", [False, True])
@pytest.mark.fault("F26")
def test_what_trains_is_what_was_asked_for(
    name: str, tune: str, train_vision: bool, train_merger: bool
) -> None:
    network = model.adapt(
        model.build(hub.find(name), dtype=torch.bfloat16),
        tune=tune,
        train_vision=train_vision,
        train_merger=train_merger,
        modules=["q_proj", "down_proj"],
    )
    expected = {
        "vision": train_vision,
        "merger": train_merger,
        "deepstack": train_merger,
        "language": tune == "full",
    }
    counts = model.count(network)
    for part, (total, trains) in counts.items():
        assert trains == (total if expected.get(part, True) else 0), part
    assert ("adapters" in counts) == (tune == "lora")
    for name_, parameter in model.trainable(network):
        assert parameter.dtype == torch.float32, name_


def test_patterns_reach_the_vision_tower_only_when_told() -> None:
    network = model.build(hub.find("tiny-qwen3-vl"))
    layers = network.config.text_config.num_hidden_layers
    assert len(model.lora_targets(network, ["q_proj"])) == layers
    targets = model.lora_targets(network, ["visual.blocks.*.attn.qkv", "q_proj"])
    assert len(targets) == layers + network.config.vision_config.depth
    with pytest.raises(BadInput) as caught:
        model.lora_targets(network, ["q_prj", "down_proj", "visual.nothing"])
    assert len(caught.value.problems) == 2
    assert (
        "'q_prj' matches no linear layer; the language model has down_proj, gate_proj"
        in caught.value.problems[0]
    )


@pytest.mark.parametrize("name", hub.TINY_MODELS)
def test_the_patch_product_is_the_convolution(name: str) -> None:
    folder = hub.find(name)
    network = model.build(folder, seed=1)
    vision = network.config.vision_config
    product = network.model.visual.patch_embed
    patches = torch.randn(10, 3 * 2 * vision.patch_size**2)
    conv = torch.nn.Conv3d(
        3, product.proj.weight.shape[0], product.proj.weight.shape[2:], product.proj.weight.shape[2:]
    )
    conv.weight = product.proj.weight
    conv.bias = (
        product.proj.bias
        if product.proj.bias is not None
        else torch.nn.Parameter(torch.zeros(len(conv.weight)))
    )
    shaped = patches.view(-1, 3, 2, vision.patch_size, vision.patch_size)
    torch.testing.assert_close(product(patches), conv(shaped).flatten(1), rtol=1e-4, atol=1e-5)


def test_random_weights_depend_on_the_seed_alone() -> None:
    folder = hub.find("tiny-qwen3-vl")
    torch.manual_seed(1)
    first = model.build(folder, seed=5).state_dict()
    torch.manual_seed(2)
    second, other = model.build(folder, seed=5).state_dict(), model.build(folder, seed=6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", hub.TINY_MODELS)
def test_rotary_frequencies_stay_fp32_in_bf16(name: str) -> None:
    network, reference = model.build(hub.find(name), dtype=torch.bfloat16), model.build(hub.find(name))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    buffers = dict(network.named_buffers())
    assert any("inv_freq" in key for key in buffers)
    for key, buffer in reference.named_buffers():
        assert buffers[key].dtype == buffer.dtype
        assert torch.equal(buffers[key], buffer)


def test_adapters_take_their_input_as_it_is_under_autocast() -> None:
    network = model.adapt(
        model.build(hub.find("tiny-qwen2-vl"), dtype=torch.bfloat16),
        tune="lora",
        train_vision=False,
        train_merger=False,
        modules=["q_proj"],
    )
    layer = model.decoder_layers(network)[0].self_attn.q_proj
    taken: list[torch.dtype] = []
    layer.lora_A["default"].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(1, 3, layer.in_features, dtype=torch.bfloat16))
    assert taken == [torch.bfloat16]
    assert out.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.dtype == torch.float32


# Folders laid out like the real ones: the hub's names of weights, several shards.

HUB_NAMES = {
    "qwen2_vl": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "qwen3_vl": (),
}


@pytest.fixture(params=hub.TINY_MODELS)
def real_layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A folder with random weights under the names that hub checkpoints have, and the model they are of."""
    source = hub.find(request.param)
    folder = Path(shutil.copytree(source.path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for section in (config, config.get("text_config", {})):
        if "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    network = model.model_class(source.family)(AutoConfig.from_pretrained(folder))
    weights = {}
    for name, value in network.state_dict().items():
        for ours, theirs in HUB_NAMES[source.family]:
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        weights[name] = value.clone()
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder, network


def test_the_names_are_those_of_the_hub(shared: Path, real_layout: tuple[Path, Any]) -> None:
    """Every name of the fixture is one of the real index, its layer numbers apart."""
    folder, network = real_layout
    name = {"qwen2_vl": "Qwen2-VL-7B-Instruct", "qwen3_vl": "Qwen3-VL-8B-Instruct"}[network.config.model_type]

    def names(index: Path) -> set[str]:
        return {".".join("N" if part.isdigit() else part for part in key.split(".")) for key in
                json.loads(index.read_text(encoding="utf-8"))["weight_map"]}  # fmt: skip

    real = shared / "qwen/checkpoint_index" / name / "model.safetensors.index.json"
    assert names(folder / "model.safetensors.index.json") == names(real)


def test_a_real_layout_in_shards_loads_whole(real_layout: tuple[Path, Any]) -> None:
    folder, expected = real_layout
    loaded = model.build(hub.find(str(folder)))
    state = loaded.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


def test_what_is_saved_after_full_training_has_the_hubs_names(
    real_layout: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = real_layout
    network = model.adapt(
        model.build(hub.find(str(folder))), tune="full", train_vision=True, train_merger=True
    )
    network.save_pretrained(tmp_path / "saved")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert load_file(tmp_path / "saved/model.safetensors").keys() == index["weight_map"].keys()


def test_a_missing_shard_is_named(real_layout: tuple[Path, Any]) -> None:
    folder, _ = real_layout
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadInput, match=r"weights missing: model-00002-of-00003.safetensors not in"):
        model.build(hub.find(str(folder)))


def test_missing_weights_are_named(real_layout: tuple[Path, Any]) -> None:
    folder, _ = real_layout
    file = folder / "model-00001-of-00003.safetensors"
    weights = load_file(file)
    gone = next(key for key in weights if "layers.0" in key)
    weights["something.else"] = weights.pop(gone)
    save_file(weights, file, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"]["something.else"] = index["weight_map"].pop(gone)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(BadInput, match=r"1 weights missing, e.g. .*layers.0") as caught:
        model.build(hub.find(str(folder)))
    assert "1 weights not of this model, e.g. something.else" in caught.value.problems[1]


def test_a_weight_of_another_shape_is_named(real_layout: tuple[Path, Any]) -> None:
    folder, _ = real_layout
    file = folder / "model-00001-of-00003.safetensors"
    weights = load_file(file)
    name = next(key for key, value in weights.items() if value.ndim == 2)
    weights[name] = torch.zeros(3, 5)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"is \(3, 5\) in the file, \(\d+, \d+\) by config.json"):
        model.build(hub.find(str(folder)))


def test_a_folder_with_no_weights_at_all_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(hub.find("tiny-qwen3-vl").path, tmp_path / "model")
    with pytest.raises(BadInput, match=r"weights missing: model.safetensors not in"):
        model.build(hub.find(str(folder)))
