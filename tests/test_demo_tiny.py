"""Tiny model folders: readable by transformers, and rendering and cutting text as Qwen's own folders do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from surgvqa.demo import scenes
from surgvqa.demo.tiny import SPECIAL_TOKENS, TINY_MODELS, write_tiny_model

REAL = {
    "tiny-qwen2-vl": Path(__file__).resolve().parents[2] / "shared/data/qwen/Qwen2-VL-7B-Instruct",
    "tiny-qwen3-vl": Path(__file__).resolve().parents[2] / "shared/data/qwen/Qwen3-VL-8B-Instruct",
}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"role": "user", "content": "Is there bleeding?"}],
    "image": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there\nbleeding? "}]}
    ],
    "answered": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many polyps?"}]},
        {"role": "assistant", "content": "2"},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " b"}, {"type": "text", "text": "c "}]},
        {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "image"}]},
    ],
    "system": [
        {"role": "system", "content": "You are an expert."},
        {"role": "user", "content": "  é <b> 'x' "},
    ],
}


@pytest.fixture(scope="module", params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def _render(template: str, messages: list[dict[str, Any]], prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt)
    return str(rendered[0])


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_config_loads_and_its_sizes_fit(folder: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    assert (
        type(config).__name__
        == {"tiny-qwen2-vl": "Qwen2VLConfig", "tiny-qwen3-vl": "Qwen3VLConfig"}[folder.name]
    )
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert sum(text.rope_parameters["mrope_section"]) == head // 2
    assert text.num_attention_heads % text.num_key_value_heads == 0
    assert config.tie_word_embeddings
    if folder.name == "tiny-qwen3-vl":
        assert vision.deepstack_visual_indexes
        assert max(vision.deepstack_visual_indexes) < vision.depth
        assert vision.out_hidden_size == text.hidden_size
    else:
        assert vision.hidden_size == text.hidden_size


def test_ids_agree_between_config_and_tokenizer(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert sorted(ids.values()) == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert config.image_token_id == ids["<|image_pad|>"]
    assert config.video_token_id == ids["<|video_pad|>"]
    assert config.vision_start_token_id == ids["<|vision_start|>"]
    assert config.vision_end_token_id == ids["<|vision_end|>"]
    assert config.text_config.eos_token_id == tokenizer.eos_token_id == ids["<|im_end|>"]
    assert tokenizer.pad_token_id == ids["<|endoftext|>"]
    assert _json(folder / "generation_config.json")["eos_token_id"] == [
        ids["<|im_end|>"],
        ids["<|endoftext|>"],
    ]
    assert len(tokenizer) <= config.text_config.vocab_size < len(tokenizer) + 64
    assert 600 <= len(tokenizer) <= 1000
    assert tokenizer.padding_side == {"tiny-qwen2-vl": "left", "tiny-qwen3-vl": "right"}[folder.name]


@pytest.mark.parametrize(
    "text", ["Is there bleeding?", " Calot's triangle, 17 mm\r\n\n  ok  ", "é 漢字 🙂 \t x_y=1e-4"]
)
def test_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_every_word_of_the_demo_is_one_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in (row for index in range(60) for row in scenes.rows(7, index)):
        for text in (row["question"], row["answer"]):
            words = text.replace("?", " ?").replace(",", " ,").replace(":", " :").split()
            assert len(tokenizer.tokenize(text)) == len(words), text


def test_special_tokens_cut_the_text(folder: Path) -> None:
    """Tokens of the parts are the tokens of the whole: question trees rest on this."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [
        f"<|im_start|>user\n{IMAGE}",
        "Is there bleeding?<|im_end|>\n<|im_start|>assistant\n",
        "no<|im_end|>\n",
    ]
    whole = tokenizer("".join(parts), add_special_tokens=False).input_ids
    assert whole == [i for part in parts for i in tokenizer(part, add_special_tokens=False).input_ids]


def test_template_renders_what_is_expected(folder: Path) -> None:
    template = _json(folder / "chat_template.json")["chat_template"]
    default = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        if folder.name == "tiny-qwen2-vl"
        else ""
    )
    body = f"<|im_start|>user\n{IMAGE}How many polyps?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert _render(template, CONVERSATIONS["answered"], prompt=False) == default + body
    assert _render(template, CONVERSATIONS["system"], prompt=True) == (
        "<|im_start|>system\nYou are an expert.<|im_end|>\n"
        "<|im_start|>user\n  é <b> 'x' <|im_end|>\n<|im_start|>assistant\n"
    )
    assert _json(folder / "tokenizer_config.json")["chat_template"] == template


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_template_renders_what_the_real_one_does(folder: Path, name: str, prompt: bool) -> None:
    real = REAL[folder.name] / "chat_template.json"
    if not real.exists():
        pytest.skip(f"no {real.parent.name} folder beside the project")
    ours = _render(_json(folder / "chat_template.json")["chat_template"], CONVERSATIONS[name], prompt)
    assert ours == _render(_json(real)["chat_template"], CONVERSATIONS[name], prompt)


def test_files_have_the_real_keys(folder: Path) -> None:
    real = REAL[folder.name]
    if not real.exists():
        pytest.skip(f"no {real.name} folder beside the project")
    ours, theirs = _json(folder / "preprocessor_config.json"), _json(real / "preprocessor_config.json")
    assert ours == theirs
    assert _json(folder / "generation_config.json").keys() == _json(
        real / "generation_config.json"
    ).keys() - {"transformers_version"}
    unneeded = {
        "transformers_version",
        "torch_dtype",
        "max_window_layers",
        "sliding_window",
        "use_sliding_window",
    }
    assert _json(real / "config.json").keys() - unneeded <= _json(folder / "config.json").keys()


def test_folder_is_the_same_every_time_and_left_alone_once_there(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    (again / "tokenizer.json").write_text("half written")
    write_tiny_model(folder.name, again)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    (again / "model.safetensors").write_text("weights")
    write_tiny_model(folder.name, again)
    assert (again / "model.safetensors").read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny-qwen2-vl, tiny-qwen3-vl"):
        write_tiny_model("tiny-qwen4-vl", tmp_path / "x")


def test_import_is_light() -> None:
    code = (
        "import sys, surgvqa.demo.tiny; "
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1]).returncode == 0
    )
