"""Models: loaded whole or not at all, frozen and adapted as the recipe says, with parts that can be counted.

Folder ── build ──▶ Qwen2-VL / Qwen3-VL, tree attention, patch embedding as a matrix product
       ── adapt ──▶ frozen parts, LoRA adapters, fp32 masters for whatever trains
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from surgvqa import attention
from surgvqa.hub import Folder, refused, with_weights
from surgvqa.recipe import BadInput
from surgvqa.tree import Pack

transformers_logging.disable_progress_bar()  # ours is the only one

Component = Literal["vision", "merger", "deepstack", "language", "lm_head", "adapters"]
COMPONENTS: tuple[Component, ...] = ("vision", "merger", "deepstack", "language", "lm_head", "adapters")


class PatchProjection(nn.Module):
    """A Conv3d whose stride is its kernel, as the matrix product that it is; same parameters, same names."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels, 2, side, side) → (patches, width)"""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def model_class(family: str) -> Any:
    """transformers' class for a key of hub.FAMILIES."""
    from transformers import Qwen2VLForConditionalGeneration, Qwen3VLForConditionalGeneration

    return {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}[family]


def build(
    folder: Folder, *, dtype: torch.dtype = torch.float32, seed: int = 0, weights: Path | None = None
) -> Any:
    """The model with its weights: of the folder, of the folder `weights`, or random ones for a tiny model.

    Raises BadInput where a weight is missing, left over or of another shape.
    """
    cls = model_class(folder.family)
    if weights is None and folder.tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(_config(cls, folder.path, folder.name))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # rotary frequencies stay fp32, as when loaded
    else:
        model = _load_whole(cls, weights or with_weights(folder), folder.name, dtype)
    return equip(model)


def equip(model: Any) -> Any:
    """Give transformers' model, in place, tree attention and the patch embedding as a matrix product."""
    embed = model.model.visual.patch_embed
    embed.proj = PatchProjection(embed.proj)
    for index, layer in enumerate(_deepstack_layers(model)):
        layer.register_forward_hook(partial(_add_deepstack, index), with_kwargs=True)
    model.config.text_config._attn_implementation = attention.NAME
    return model.eval()


def skeleton(folder: Folder) -> Any:
    """The model's structure without any weights, for looking at names and shapes."""
    cls = model_class(folder.family)
    with torch.device("meta"):
        return cls(_config(cls, folder.path, folder.name))


def _config(cls: Any, path: Path, name: str) -> Any:
    """config.json as transformers' own class reads it, with attention that is in torch.

    There an `attn_implementation` may be a hub repository, whose code would be fetched and run.
    """
    try:
        config = cls.config_class.from_pretrained(path)
    except Exception as error:  # whatever values of a wrong type come to
        raise BadInput(
            f"{name}: {path}/config.json cannot be used: {' '.join(str(error).split())}"
        ) from error
    config._attn_implementation = "sdpa"
    return config


def _load_whole(cls: Any, path: Path, name: str, dtype: torch.dtype) -> Any:
    if problems := refused(path, name):
        raise BadInput(problems)
    config = _config(cls, path, name)
    try:
        model, info = cls.from_pretrained(
            path,
            config=config,
            attn_implementation="sdpa",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(
            f"{name}: weights in {path} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    problems = []
    for kind, keys in (("missing", info["missing_keys"]), ("not of this model", info["unexpected_keys"])):
        if keys:
            problems.append(
                f"{name}: {len(keys)} weights {kind}, e.g. {', '.join(sorted(map(str, keys))[:3])}"
            )
    for key, found, expected in sorted(info["mismatched_keys"])[:5]:
        problems.append(f"{name}: {key} is {tuple(found)} in the file, {tuple(expected)} by config.json")
    if problems:
        raise BadInput(problems)
    return model


def adapt(
    model: Any,
    *,
    tune: str,
    train_vision: bool,
    train_merger: bool,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    modules: Sequence[str] = (),
    seed: int = 0,
    name: str = "",
    revision: str | None = None,
    adapter: Path | None = None,
) -> Any:
    """Freeze, add adapters, and make fp32 masters of what trains; in place, and wrapped by PEFT for `lora`.

    `name` and `revision` are those of the base model, for whoever loads the adapters; `adapter` is a
    folder to read their weights from. Raises BadInput for a pattern that matches nothing.
    """
    trains: dict[Component, bool] = {
        "vision": train_vision,
        "merger": train_merger,
        "deepstack": train_merger,
        "language": tune == "full",
        "lm_head": tune == "full",
        "adapters": True,
    }
    if tune == "lora":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT asks by the name that transformers 5.22 gave up.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            whole = _saved_whole(model, train_vision, train_merger)
            for path, module in model.named_modules():
                if any(path.endswith(f".{part}") for part in whole):
                    module.float()  # PEFT copies them as they are, and reads saved ones into that
            targets = lora_targets(model, modules, train_vision=train_vision, train_merger=train_merger)
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=targets,
                modules_to_save=whole or None,
            )
            model = get_peft_model(model, config)
            if adapter is not None:
                _load_adapters(model, adapter)
        for module in model.modules():
            if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
                module.original_module = nn.Identity()  # the untrained twin would only take memory
            if hasattr(module, "cast_input_dtype_enabled"):
                # PEFT would copy each adapter's input to fp32, for autocast to copy it back to bf16 and keep.
                module.cast_input_dtype_enabled = False
        # Others load the adapter onto this: a hub id, not wherever its files lie on this machine.
        model.peft_config["default"].base_model_name_or_path = name
        model.peft_config["default"].revision = revision
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(trains[component_of(path)])
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _load_adapters(model: Any, folder: Path) -> None:
    """Read what `save` wrote into a model adapted likewise.

    The folder's adapter_config.json is for others: PEFT would import modules that it names, and where there
    are no safetensors read a pickle. Raises BadInput where the adapters are not those of this model.
    """
    from peft import set_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    try:
        found = set_peft_model_state_dict(model, load_file(file))
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"{file}: not the adapters of this recipe: {' '.join(str(error).split())}") from None
    missing = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
    if wrong := sorted([*missing, *found.unexpected_keys]):
        raise BadInput(f"{file}: not the adapters of this recipe: {len(wrong)} do not match, e.g. {wrong[0]}")


def lora_targets(
    model: Any, modules: Sequence[str], *, train_vision: bool = False, train_merger: bool = False
) -> list[str]:
    """Full names of the linear layers that the recipe's `model.lora.modules` mean.

    Raises BadInput for a pattern that matches nothing, or a module that trains whole already.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    whole = _saved_whole(model, train_vision, train_merger)
    targets: dict[str, None] = {}
    problems = []
    for pattern in modules:
        if "." in pattern:
            glob = re.compile(fnmatch.translate(f"*{pattern}"))
            matched = [name for name in linear if glob.match(name)]
        else:
            matched = [name for name in linear if ".language_model." in name and name.endswith(f".{pattern}")]
        twice = [name for name in matched if any(f".{part}." in f".{name}." for part in whole)]
        if not matched:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear if ".language_model." in name})
            problems.append(
                f"model.lora.modules: {pattern!r} matches no linear layer; "
                f"the language model has {', '.join(known)}"
            )
        elif twice:
            problems.append(
                f"model.lora.modules: {pattern!r} matches {twice[0]}, which model.train_vision or "
                "model.train_merger trains whole; leave out the one or the other"
            )
        targets.update(dict.fromkeys(matched))
    if problems:
        raise BadInput(problems)
    return list(targets)


def _saved_whole(model: Any, train_vision: bool, train_merger: bool) -> list[str]:
    """Modules that train beside the adapters, by the names PEFT stores them under."""
    if train_vision:
        return ["visual"]
    if not train_merger:
        return []
    mergers = getattr(model.model.visual, "deepstack_merger_list", ())
    return ["visual.merger", *(f"deepstack_merger_list.{index}" for index in range(len(mergers)))]


def component_of(name: str) -> Component:
    """The part of the model that a parameter belongs to, by its name."""
    if "lora_" in name:
        return "adapters"
    if "deepstack_merger_list" in name:
        return "deepstack"
    if "visual.merger" in name or ("visual." in name and ".merger." in name):
        return "merger"
    if "visual." in name:
        return "vision"
    return "lm_head" if "lm_head" in name else "language"


def count(model: Any) -> dict[Component, tuple[int, int]]:
    """(all, trainable) parameters of each part that there is; a tied lm_head counts with the embedding."""
    counts: dict[Component, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = component_of(name)
        total, trainable = counts.get(part, (0, 0))
        counts[part] = total + parameter.numel(), trainable + parameter.numel() * parameter.requires_grad
    return {part: counts[part] for part in COMPONENTS if part in counts}


def weights(model: Any) -> dict[str, Tensor]:
    """The model's own tensors that `save` writes: adapters with what trains beside them, or all."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if not hasattr(model, "peft_config"):
        return state
    return {name: value for name, value in state.items() if "lora_" in name or ".modules_to_save." in name}


def save(model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write `weights`, or a copy of them, with the model's configuration: adapters as PEFT does, the whole
    model as transformers does."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to be filled in
    else:
        model.save_pretrained(folder, state_dict=dict(weights))


def checkpoint_bytes(model: Any) -> int:
    """About how many bytes `save` and AdamW's two moments in fp32 take."""
    whole = not hasattr(model, "peft_config")
    size = 0
    for name, p in model.named_parameters():
        # PEFT saves its copies of modules whole, with what is frozen inside them.
        saved = whole or p.requires_grad or ".modules_to_save." in name
        size += p.numel() * (p.element_size() * saved + 8 * p.requires_grad)
    return size


def base(model: Any) -> Any:
    """The Qwen model inside PEFT's wrapping, adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def finite(model: nn.Module) -> bool:
    """Return whether all trainable weights are finite."""
    return all(bool(parameter.isfinite().all()) for _, parameter in trainable(model))


def hidden_states(model: Any, pack: Pack, attn: str, cache: Any = None) -> Tensor:
    """(tokens, width) what the language model makes of each token of a pack, before `lm_head`.

    `attn` is `sdpa` or `flex`; keys and values go into `cache`, a DynamicCache, if there is one. Nothing
    here waits for the device: what the host must know, the pack knows.
    """
    qwen = base(model).model
    embeds = qwen.get_input_embeddings()(pack.ids)
    images, deepstack = image_features(model, pack.patches, pack.grids)

    def at_images(into: Tensor, features: Tensor) -> Tensor:
        return into.index_copy(1, pack.image_at, features[None].to(into.dtype))

    nothing = torch.zeros_like(embeds) if deepstack else embeds
    out = qwen.language_model(
        inputs_embeds=at_images(embeds, images),
        position_ids=pack.positions,
        past_key_values=cache,
        use_cache=cache is not None,
        deepstack=[at_images(nothing, features) for features in deepstack],
        **attention.arguments(pack, attn),
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of the language model."""
    return list(base(model).model.language_model.layers)


def recompute(model: Any, layers: int) -> None:
    """Keep no activations of the first `layers` decoder layers, nor, if any, of the vision tower's blocks.

    They are made again in the backward pass, which costs a forward pass of those layers.
    """
    qwen = base(model)
    if layers:
        # transformers renamed it in 5.22 and warns about the old name.
        enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the reentrant kind fails under DDP
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = index < layers  # type: ignore[assignment]  # no submodule
    for block in qwen.model.visual.blocks:
        block.gradient_checkpointing = layers > 0


def compile_layers(model: Any) -> None:
    """Have torch.compile make kernels of each decoder layer, once for all lengths; used while it trains.

    In evaluation each layer would be compiled by itself, since it writes to its own place of the cache.
    """

    def either(layer: nn.Module, eager: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else eager)(*args, **kwargs)

    for layer in decoder_layers(model):
        eager = layer.forward
        layer.forward = partial(either, layer, eager, torch.compile(eager, dynamic=True))


def image_features(model: Any, patches: Tensor, grids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(image tokens, width) of each image, one after the other, and Qwen3-VL's deepstack features likewise.

    `grids` (images, 3) lies on the host: from there transformers' helpers make what its vision tower would
    otherwise ask the device for in every block.
    """
    qwen = base(model).model
    tower, device = qwen.visual, patches.device
    known = {
        "position_ids": get_vision_position_ids(grids, tower.spatial_merge_size).to(
            device, non_blocking=True
        ),
        "cu_seqlens": get_vision_cu_seqlens(grids),
    }
    if hasattr(tower, "num_grid_per_side"):
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        known["interp_indices"] = indices.to(device, non_blocking=True)
        known["interp_weights"] = weights.to(device, non_blocking=True)
    out = qwen.get_image_features(patches, grids, return_dict=True, **known)
    deepstack = getattr(out, "deepstack_features", None) or []
    return torch.cat(list(out.pooler_output)), [torch.cat(list(features)) for features in deepstack]


def _deepstack_layers(model: Any) -> list[nn.Module]:
    """The language model's layers that add image features of the vision tower's inner blocks: Qwen3-VL's."""
    mergers = getattr(model.model.visual, "deepstack_merger_list", ())
    return list(model.model.language_model.layers[: len(mergers)])


def _add_deepstack(
    index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Tensor:
    """Behind a layer: its image features, as (1, tokens, width) with zeros elsewhere.

    transformers adds them through a boolean mask, whose size the host would have to wait for.
    """
    features = kwargs.get("deepstack")
    return out + features[index] if features else out
