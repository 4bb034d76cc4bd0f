"""Model folders: a hub id, a local folder or a tiny model's name → a checked folder on disk.

    name, revision ── find ──▶ Folder(path, family, patch, merge, ...)   small files only, no weights
    a checkpoint that holds a whole model ── saved ──▶ Folder
    Folder ── with_weights ──▶ path                                       with its safetensors

Tokenizer, chat template and image processor are found in every layout that transformers reads: the image
processor's settings in preprocessor_config.json or in processor_config.json, the chat template in a file of
its own or in another's. Only safetensors and JSON are ever read; code in a model folder is never run.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from surgvqa import grounding
from surgvqa.datasets.remote import unreachable
from surgvqa.demo import cached
from surgvqa.demo.tiny import TINY_MODELS, write_tiny_model
from surgvqa.recipe import BadInput

FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen3_vl": "Qwen3-VL"}

_INDEX = "model.safetensors.index.json"
_SMALL_FILES = ["*.json", "*.txt", "*.jinja"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class Folder:
    """A model folder whose configuration and vocabulary have been found sound."""

    path: Path
    """Where config.json and the weights are read from."""
    processor: Path
    """Where tokenizer, chat template and image processor are: `path`, or a checkpoint's folder."""
    name: str
    revision: str | None
    """The hub's commit where that is known, so that it can be had again; else as it was asked for."""
    family: str
    """A key of FAMILIES: the folder's `model_type`."""
    patch: int
    """Side of a vision patch, in pixels."""
    merge: int
    """Patches per side that become one token."""
    special: Mapping[str, int]
    """The ids that the configuration gives image and vision tokens."""
    special_tokens: frozenset[str]
    """The tokens that give a conversation its structure, as text: turns, images, boxes. No text of the data
    may hold one. Other added tokens, such as `<think>` or one of the user's own, are text like any other."""

    @property
    def factor(self) -> int:
        """Pixels per token and side; canvases are multiples of it."""
        return self.patch * self.merge

    @property
    def tiny(self) -> bool:
        return self.name in TINY_MODELS

    @property
    def commit(self) -> str | None:
        """The hub's commit of the files; None for a local folder, or a revision that is not resolved."""
        return self.revision if is_commit(self.revision) else None


def find(
    name: str, revision: str | None = None, *, fetch: bool = True, processor: Path | None = None
) -> Folder:
    """Locate a model and check everything but its weights. Raises BadInput with all that is wrong with it.

    With `fetch` False a hub id is looked for in the local cache alone. A branch or tag is resolved to its
    commit. With `processor`, tokenizer, chat template and image processor are read from that folder.
    """
    if name in TINY_MODELS:
        path = write_tiny_model(name, cached(name))
    elif Path(name).is_dir():
        path = Path(name)
    else:
        path = _download(name, revision, _SMALL_FILES, fetch)
        if path.parent.name == "snapshots" and is_commit(path.name):
            revision = path.name
    folder = _checked(path, processor or path, name, revision)
    if processor is None:
        check_processor(folder)
    return folder


def check_processor(folder: Folder) -> None:
    """Raise BadInput where the image processor cuts an image into other patches than the model takes."""
    settings = image_processor(folder.processor, folder.name)
    for key, taken in (("patch_size", folder.patch), ("merge_size", folder.merge)):
        if (given := settings.get(key, taken)) != taken:
            raise BadInput(
                f"{folder.name}: {key} of the image processor in {folder.processor} is {given}, and {taken} "
                f"in {folder.path / 'config.json'}; give the files of one model"
            )


def saved(folder: Path, name: str, revision: str | None) -> Folder:
    """Return the model of a checkpoint of `tune: full`, which holds all of it. Reads no base model.

    `name` and `revision` are those of the base model.
    """
    return _checked(folder, folder, name, revision)


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit hash, which cannot move, and not a branch or tag."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _checked(path: Path, processor: Path, name: str, revision: str | None) -> Folder:
    config = read_json(path / "config.json", f"{name} is not a model folder")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(
            f"{name}: model_type is {family!r}; surgvqa trains Qwen2-VL (qwen2_vl) and Qwen3-VL (qwen3_vl)"
        )
    if not (processor / "tokenizer.json").is_file() and not (
        (processor / "vocab.json").is_file() and (processor / "merges.txt").is_file()
    ):
        raise BadInput(
            f"{name}: no vocabulary: neither tokenizer.json nor vocab.json with merges.txt is in "
            f"{processor}. Copy the tokenizer files of the original model into the folder"
        )
    image_processor(processor, name)
    if problems := refused(path, name):
        raise BadInput(problems)
    template = ""
    with contextlib.suppress(BadInput):  # `ChatTokens` says what is wrong with it
        template = chat_template(processor, name)
    try:
        patch, merge = _geometry(config)
        special = {
            "<|image_pad|>": int(config.get("image_token_id", 151655)),
            "<|vision_start|>": int(config.get("vision_start_token_id", 151652)),
            "<|vision_end|>": int(config.get("vision_end_token_id", 151653)),
        }
        special_tokens = _special_tokens(processor, config, template)
    except (AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        raise BadInput(
            f"{name}: config.json or the tokenizer's files in {path} are not laid out like "
            f"{FAMILIES[family]}'s: {type(error).__name__}: {error}"
        ) from None
    if template and _thinks(template):
        raise BadInput(
            f"{name}: its chat template begins every answer with <think>, as those of Thinking models do; "
            "surgvqa trains answers without a thought. Take the Instruct model of the same size"
        )
    if not (1 <= patch <= 64 and 1 <= merge <= 64):
        raise BadInput(
            f"{name}: patch_size {patch} and spatial_merge_size {merge} in {path}/config.json: not 1 to 64"
        )
    return Folder(path, processor, name, revision, family, patch, merge, special, special_tokens)


def _geometry(config: Mapping[str, Any]) -> tuple[int, int]:
    """Side of a vision patch in pixels, and patches per side of a token, as config.json has them."""
    vision = config.get("vision_config", {})
    patch = int(vision.get("patch_size", 14 if config["model_type"] == "qwen2_vl" else 16))
    return patch, int(vision.get("spatial_merge_size", 2))


def factor_of(config: Mapping[str, Any]) -> int | None:
    """`Folder.factor` by a config.json alone, such as a checkpoint's; None where it has none."""
    try:
        patch, merge = _geometry(config) if config["model_type"] in FAMILIES else (0, 0)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None
    return patch * merge if 1 <= patch <= 64 and 1 <= merge <= 64 else None


def image_processor(path: Path, name: str) -> dict[str, Any]:
    """Return the image processor's settings, from processor_config.json, which transformers 5 writes, or
    else preprocessor_config.json. Raises BadInput where there are none.
    """
    nested, own = path / "processor_config.json", path / "preprocessor_config.json"
    missing = f"{name}: the image processor's settings are missing"
    settings = read_json(nested, missing).get("image_processor") if nested.exists() else None
    if settings is None:
        if nested.exists() and not own.exists():
            raise BadInput(
                f"{missing}: {nested} has no image_processor, and there is no {own.name} beside it"
            )
        return read_json(own, missing)
    if not isinstance(settings, dict):
        raise BadInput(f"{missing}: image_processor in {nested} is no object")
    return settings


def chat_template(path: Path, name: str) -> str:
    """Return a folder's chat template, from the first file that has one, in the order of transformers.

    Returns the default where a file has several. Raises BadInput where there is none.
    """
    for file in (
        "processor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer_config.json",
    ):
        if not (path / file).exists():
            continue
        if file.endswith(".jinja"):
            return _text(path / file, f"{name}: unreadable chat template")
        given = read_json(path / file, f"{name}: unreadable chat template").get("chat_template")
        if given is None and file != "chat_template.json":
            continue
        template = given
        if isinstance(given, list):  # the older form of several
            given = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
        if isinstance(given, dict):
            template = given.get("default")
        if not isinstance(template, str):
            raise BadInput(f"{name}: chat_template in {path / file} cannot be used: it is not a text")
        return template
    raise BadInput(f"{name}: no chat template in {path}")


def refused(path: Path, name: str) -> list[str]:
    """What in a folder would have transformers read another model, pickles or files elsewhere."""
    problems = []
    if (path / "adapter_config.json").exists():
        problems.append(
            f"{name}: {path} holds adapters (adapter_config.json), not a whole model; give the model "
            "that they belong to"
        )
    if "quantization_config" in read_json(path / "config.json", f"{name} is not a model folder"):
        problems.append(
            f"{name}: {path}/config.json has a quantization_config; only weights that are not quantized are "
            "read"
        )
    index = path / _INDEX
    shards = read_json(index, f"{name}: unreadable index").get("weight_map") if index.exists() else {}
    if not isinstance(shards, dict):
        return [*problems, f"{name}: unreadable index: {index} has no weight_map"]
    for shard in sorted({str(shard) for shard in shards.values()}):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            problems.append(f"{name}: {index} names {shard!r}; only *.safetensors beside it are read")
    return problems


def with_weights(folder: Folder) -> Path:
    """The folder's path once all its safetensors are there; hub models are fetched now.

    Raises BadInput naming the files that are missing.
    """
    path = folder.path
    if not Path(folder.name).is_dir():
        path = _download(folder.name, folder.revision, [*_SMALL_FILES, "*.safetensors"])
    missing = missing_weights(path, folder.name)
    if missing:
        raise BadInput(
            f"{folder.name}: weights missing: {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''} not in {path}"
        )
    return path


def weights_files(path: Path, name: str) -> list[str]:
    """Return the names of the safetensors files that a model folder's weights are read from."""
    index = path / _INDEX
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(read_json(index, f"{name}: unreadable index")["weight_map"].values()))


def missing_weights(path: Path, name: str) -> list[str]:
    """Return those of `weights_files` that are not in the folder."""
    return [file for file in weights_files(path, name) if not (path / file).is_file()]


def is_remote(name: str) -> bool:
    """Whether a name can only be a hub id, which may have to be fetched."""
    return (
        name not in TINY_MODELS
        and not Path(name).is_dir()
        and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    )


def processor_files(folder: Folder) -> dict[str, bytes]:
    """Return the name and content of the files to keep beside trained weights: those of the tokenizer, the
    chat template and the image processor, and config.json, which with adapters tells their base model.
    """
    files = [*(folder.processor / name for name in _PROCESSOR_FILES), folder.path / "config.json"]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def write_processor(files: Mapping[str, bytes], target: Path) -> None:
    """Write `processor_files` into a checkpoint, except those that it has already, such as config.json."""
    for name, content in files.items():
        if not (target / name).exists():
            (target / name).write_bytes(content)


_STRUCTURE = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|quad_start|>", "<|quad_end|>", *grounding.TOKENS,
)  # fmt: skip
"""Structural tokens of both families."""


def _special_tokens(path: Path, config: Mapping[str, Any], template: str) -> frozenset[str]:
    """Return the structural tokens of a folder: those of both families, those whose ids are in config.json,
    the tokenizer's end and padding tokens, and those that are flagged special and in the chat template.

    Neither the flag nor the template is enough: `add_special_tokens` also flags a user's `<grasper>`, and
    the template of Qwen3-VL names `<tool_call>`, which is text to the tokenizer.
    """
    flagged: dict[str, bool] = {}
    by_id: dict[int, str] = {}
    tokenizer, settings = (
        read_json(path / name, "unreadable tokenizer") if (path / name).is_file() else {}
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    decoder = settings.get("added_tokens_decoder", {})
    entries = [(token["id"], token) for token in tokenizer.get("added_tokens", [])]
    for number, token in [*entries, *((int(number), token) for number, token in decoder.items())]:
        flagged[token["content"]] = flagged.get(token["content"], False) or token.get("special", False)
        by_id[number] = token["content"]
    named = (settings.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk"))
    texts = {each["content"] if isinstance(each, dict) else each for each in named if each}
    wanted = {
        value
        for of in (config, config.get("text_config", {}))
        for key, value in of.items()
        if key.endswith("_token_id") and isinstance(value, int)
    }
    texts |= {by_id[number] for number in wanted & by_id.keys()}
    texts |= {text for text, special in flagged.items() if special and text in template}
    return frozenset({*texts, *_STRUCTURE})


def _thinks(template: str) -> bool:
    """Return whether a chat template begins every answer with <think>.

    Renders it as transformers does, in jinja2's sandbox. False if that fails: `ChatTokens` reports the error.
    """
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    question = "question"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        text = sandbox.from_string(template).render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True
        )
    except Exception:  # whatever a template may do
        return False
    prompt = text.rpartition(question)[2]
    return "<think>" in prompt and "</think>" not in prompt


def _download(name: str, revision: str | None, patterns: list[str], fetch: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    why = unreachable(f"the model {name}") if fetch and is_remote(name) else ""
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, local_files_only=not fetch or bool(why)
            )
        )
    except HFValidationError:
        raise BadInput(
            f"model.name: {name!r} is neither a folder here nor a hub id such as owner/name"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise BadInput(
            f"{name}{at}: not in the local cache and could not be fetched "
            f"({why or str(error).splitlines()[0]}). "
            f"Where there is no connection: fetch it on a machine that has one, with `hf download {name}` "
            "into the same HF_HOME, or give a local folder as model.name"
        ) from None


def _text(path: Path, failure: str) -> str:
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise BadInput(f"{failure}: {path} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"{failure}: {path}: {error}") from None


def read_json(path: Path, failure: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises BadInput, which begins with `failure`, where there is none."""
    text = _text(path, failure)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{failure}: {path}: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{failure}: {path} does not hold an object")
    return content
