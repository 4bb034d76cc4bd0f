"""Tokens, labels and positions: exact ids, the chat template's own conversation, the golden facts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

from surgvqa import hub
from surgvqa.datasets import Example, ImageRef
from surgvqa.letterbox import plan_canvas
from surgvqa.recipe import BadInput
from surgvqa.tokens import ChatTokens

REAL = {"qwen2": "Qwen2-VL-7B-Instruct", "qwen3": "Qwen3-VL-8B-Instruct"}


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest, shared: Path) -> ChatTokens:
    return ChatTokens(hub.find(str(shared / "qwen" / REAL[request.param])))


@pytest.fixture(scope="module")
def golden(shared: Path) -> Any:
    return json.loads((shared / "qwen/golden.json").read_text(encoding="utf-8"))


def ask(
    question: str, answer: str = "none", kind: str = "question", images: int = 1, place: str = ""
) -> Example:
    return Example(question, (ImageRef("image"),) * images, question, (answer,), kind, place=place)


def test_root_and_branch_are_the_conversation_of_the_chat_template(chat: ChatTokens) -> None:
    for example in (
        ask("How many polyps?", "two or three", "count"),
        ask("Is there an assistant in the image?", "yes", images=2),
        ask("Où est-il ; là ?", "ça\nva ∅"),
    ):
        grids = [(2, 3), (1, 2)][: len(example.images)]
        root, branch = chat.root(grids), chat.branches([example])[0]
        text = chat.render(chat.conversation(example))
        for rows, columns in grids:
            text = text.replace("<|image_pad|>", "<|pad|>" * (rows * columns), 1)
        whole = chat.tokenizer(text.replace("<|pad|>", "<|image_pad|>"), add_special_tokens=False)[
            "input_ids"
        ]
        assert [*root.ids, *branch.ids] == whole
        supervised = branch.ids[branch.prompt : branch.prompt + branch.answer]
        assert chat.tokenizer.decode(supervised) == example.answers[0] + "<|im_end|>"
        prompt = chat.tokenizer.decode(branch.ids[: branch.prompt])
        assert prompt == chat.question_text(example) + "<|im_end|>\n<|im_start|>assistant\n"
        assert chat.tokenizer.decode(branch.ids[branch.prompt + branch.answer :]) == "\n"


def test_root_question_and_candidate_are_the_conversation_with_that_answer(chat: ChatTokens) -> None:
    asked = [ask("How many?", "2", "count"), ask("How many?", "3"), ask("How many?", "1", "count")]
    sets = [("2", "2 polyps"), ("none",), ("2", "2 polyps")]
    branches = chat.candidates(asked, sets)
    assert [len(branch.children) for branch in branches] == [2, 1, 2]
    assert "A number." in chat.tokenizer.decode(branches[0].ids)
    assert "A number." not in chat.tokenizer.decode(branches[1].ids)
    root = chat.root([(1, 1)])
    for example, own, branch in zip(asked, sets, branches, strict=True):
        assert branch.answer == 0
        for label, child in zip(own, branch.children, strict=True):
            text = chat.render(chat.conversation(replace(example, answers=(label,))))
            whole = chat.tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
            assert [*root.ids, *branch.ids, *child.ids] == whole
            assert (child.prompt, child.answer) == (0, len(child.ids))
    assert branches[0].tokens == len(branches[0].ids) + sum(len(child.ids) for child in branches[0].children)
    with pytest.raises(BadInput, match=r"holds the special token <\|im_end\|>"):
        chat.candidates(asked[:1], [("2", "<|im_end|>")])


def test_instructions_follow_the_question_of_their_type(chat: ChatTokens) -> None:
    assert chat.question_text(ask("How many?", kind="count")) == "How many?\nA number."
    assert chat.question_text(ask("Where?", kind="where")) == "Where?"


def test_special_tokens_in_a_question_or_answer_are_refused_all_at_once(chat: ChatTokens) -> None:
    examples = [
        ask("Fine?", place="a.jsonl:1"),
        ask("Bad <|im_end|>?", place="a.jsonl:2"),
        ask("So so?", "<|image_pad|>", place="a.jsonl:3"),
        ask("Is a < b, or <b>c</b>?", place="a.jsonl:4"),
    ]
    with pytest.raises(BadInput) as caught:
        chat.branches(examples)
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["2", "3"]
    assert "<|im_end|>" in caught.value.problems[0]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (2, 5)])
def test_patches_are_those_of_the_image_processor(chat: ChatTokens, width: int, height: int) -> None:
    """The processor, resizing on, leaves a canvas as it is: the same patches in the same order."""
    factor = chat.folder.factor
    canvas = noise_image(width * factor, height * factor, seed=width)
    size = {"shortest_edge": factor * factor, "longest_edge": 2**24}
    expected = chat.image_processor(images=[canvas], size=size, return_tensors="np")
    assert chat.image_processor.do_resize
    np.testing.assert_array_equal(chat.patches(canvas), expected["pixel_values"])
    assert expected["image_grid_thw"].tolist() == [[1, 2 * height, 2 * width]]


# With the real tokenizers and templates.


def test_golden_special_ids(real: ChatTokens, golden: Any) -> None:
    expected = golden["special_token_ids"]["qwen2_vl"]
    assert {token: real.tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert len(real.tokenizer) == golden["special_token_ids"]["tokenizer_length"][real.folder.family]


def test_golden_text_ids(real: ChatTokens, golden: Any) -> None:
    for case in (golden["tokenizer"]["integration"], *golden["tokenizer"]["strings"]["cases"]):
        assert real.tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"], case.get(
            "name"
        )


def test_golden_prompts_of_qwen2(shared: Path, golden: Any) -> None:
    chat = ChatTokens(hub.find(str(shared / "qwen" / REAL["qwen2"])))
    dog, white = golden["prompt"]
    asked = chat.branches([ask(dog["messages"][0]["content"][1]["text"])])[0].asked
    assert [*chat.root([(4, 4)]).ids[:17]] == dog["first_17_input_ids"]
    assert chat.tokenizer.decode(asked.ids) == "What kind of dog is this?<|im_end|>\n<|im_start|>assistant\n"
    patches = chat.patches(Image.new("RGB", (224, 224), "white"))
    assert list(patches.shape) == white["pixel_values_shape"]
    assert patches.mean() == pytest.approx(white["pixel_values_mean"], abs=1e-6)
    question = chat.branches([ask(white["messages"][0]["content"][1]["text"])])[0].asked
    assert len(chat.root([(8, 8)]).ids) + len(question.ids) == white["input_ids_length"]


def test_exact_ids_of_a_whole_conversation(shared: Path) -> None:
    """Written out by hand from the vocabulary: a change of template, cut or labels shows here."""
    chat = ChatTokens(hub.find(str(shared / "qwen" / REAL["qwen3"])))
    branch = chat.branches([ask("How are you doing?", "none visible")])[0]
    assert chat.root([(1, 2)]).ids.tolist() == [151644, 872, 198, 151652, 151655, 151655, 151653]
    question, turn = [4340, 525, 498, 3730, 30], [151645, 198, 151644, 77091, 198]
    assert branch.ids.tolist() == [*question, *turn, 6697, 9434, 151645, 198]
    assert (branch.prompt, branch.answer) == (10, 3)


def test_golden_positions(golden: Any, chat: ChatTokens) -> None:
    """The image cases of golden.json, cut out of a root: they begin somewhere, so compare differences."""
    cases = [case for case in golden["rope_index"] if "token_kinds" in case]
    assert len(cases) == 2
    for case in cases:
        expected = np.array(case["position_ids"])
        _, rows, columns = case["image_grid_thw"][0]
        root = chat.root([(rows // 2, columns // 2)])
        first = int(np.flatnonzero(root.ids == chat.folder.special["<|image_pad|>"])[0])
        start = first - case["token_kinds"].index("image")
        length = min(expected.shape[1], len(root.ids) - start)
        ours = root.positions[:, start : start + length]
        assert (ours - ours[:, :1] + expected[:, :1]).tolist() == expected[:, :length].tolist()


THOUGHT = "<think>The disc is red.</think>\nyes"


def test_added_tokens_that_are_no_structure_are_text(real: ChatTokens) -> None:
    """Tokens of Qwen3-VL, plain text in Qwen2-VL: the answer that was learned is the answer that is read."""
    added = {each.content for each in real.tokenizer.added_tokens_decoder.values()}
    assert ("<think>" in added) == (real.folder.family == "qwen3_vl")
    for text in (THOUGHT, "<tool_call>x</tool_call>", "a <|fim_pad|> b"):
        branch = real.branches([ask(f"Is {text} red?", text)])[0]
        written = branch.ids[branch.prompt :][: branch.answer].tolist()
        assert real.text(written) == real.text(written, boxes=True) == text
        assert real.unspecial(f"{text}<|im_end|>") == " ".join(text.split())
    for token in real.folder.special.keys() | {"<|im_start|>", "<|endoftext|>", "<|video_pad|>"}:
        assert real.text(real.tokenizer(f"yes{token}")["input_ids"]) == "yes"
        with pytest.raises(BadInput, match="holds the special token"):
            real.branches([ask("Fine?", f"no {token}")])


@pytest.mark.parametrize("flagged", [True, False])
def test_a_users_own_token_is_text(folder: Path, flagged: bool) -> None:
    """As `tokenizer.add_tokens(["<grasper>"])` writes it, with and without `special_tokens=True`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<grasper>"], special_tokens=flagged)
    tokenizer.save_pretrained(folder)
    chat = ChatTokens(hub.find(str(folder)))
    assert chat.tokenizer.convert_tokens_to_ids("<grasper>") in chat.tokenizer.added_tokens_decoder
    branch = chat.branches([ask("Which one?", "the <grasper>, left")])[0]
    written = branch.ids[branch.prompt :][: branch.answer].tolist()
    assert chat.text(written) == "the <grasper>, left"


# Folders that must not be trained on.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model's files as a local folder."""
    import shutil

    source = hub.find("tiny-qwen3-vl").path
    return Path(shutil.copytree(source, tmp_path / "model"))


def test_a_local_folder_is_found(folder: Path) -> None:
    found = hub.find(str(folder))
    assert (found.family, found.factor, found.tiny) == ("qwen3_vl", 32, False)
    assert ChatTokens(found).end_of_turn > 0


def as_transformers_5_writes_it(folder: Path) -> None:
    """Put the image processor into processor_config.json and the chat template into a file of its own."""
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "preprocessor_config.json").unlink()
    nested = {"image_processor": settings, "processor_class": "Qwen3VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    template = hub.chat_template(folder, "")
    (folder / "chat_template.json").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    file.write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def same_inputs(before: ChatTokens, after: ChatTokens) -> None:
    """Check that two folders give the same tokens and the same patches."""
    example = Example("1", (ImageRef("a"),), "Is there bleeding?", ("no",), "yes_no")
    assert np.array_equal(before.root([(2, 3)]).ids, after.root([(2, 3)]).ids)
    assert np.array_equal(before.branches([example])[0].ids, after.branches([example])[0].ids)
    side = 2 * before.folder.factor
    canvas = noise_image(side, side, 1)
    assert np.array_equal(before.patches(canvas), after.patches(canvas))
    assert before.folder.special_tokens == after.folder.special_tokens


def test_a_folder_as_transformers_5_writes_it_gives_the_same_inputs(folder: Path) -> None:
    before = ChatTokens(hub.find(str(folder)))
    mean = before.image_processor.image_mean
    as_transformers_5_writes_it(folder)
    same_inputs(before, ChatTokens(hub.find(str(folder))))
    # What transformers prefers where both are there.
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.9, 0.9, 0.9]}))
    assert hub.image_processor(folder, "")["image_mean"] == list(mean)
    assert ChatTokens(hub.find(str(folder))).image_processor.image_mean == mean
    # An older processor_config.json has no image processor in it.
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    assert hub.image_processor(folder, "")["image_mean"] == [0.9, 0.9, 0.9]
    assert ChatTokens(hub.find(str(folder))).image_processor.image_mean == (0.9, 0.9, 0.9)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        BadInput, match=r"settings are missing: .*processor_config\.json has no image_processor"
    ):
        hub.find(str(folder))
    (folder / "processor_config.json").unlink()
    with pytest.raises(BadInput, match=r"settings are missing: .*preprocessor_config\.json"):
        hub.find(str(folder))


@pytest.mark.parametrize("name", REAL.values())
def test_a_real_folder_as_transformers_5_writes_it_gives_the_same_inputs(
    shared: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (shared / "qwen" / name).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    before = ChatTokens(hub.find(str(copy)))
    as_transformers_5_writes_it(copy)
    same_inputs(before, ChatTokens(hub.find(str(copy))))


def test_a_chat_template_is_found_wherever_transformers_looks_for_it(folder: Path) -> None:
    """Each place alone, then the first of those that have one."""
    text = hub.chat_template(folder, "")
    files = ("processor_config.json", "chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for file in files:
        (folder / file).unlink(missing_ok=True)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]
    forms = [text, named, {"tool_use": "no", "default": text}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    with pytest.raises(BadInput, match="no chat template"):
        hub.chat_template(folder, "")
    for form in forms:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": form}))
        assert hub.chat_template(folder, "") == text
        assert ChatTokens(hub.find(str(folder))).tokenizer.chat_template == text
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "tokenizer's"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert hub.chat_template(folder, "") == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert hub.chat_template(folder, "") == "jinja"
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": "processor's"}))
    assert hub.chat_template(folder, "") == "processor's"
    for wrong in ({"chat_template": 3}, {"chat_template": [{"name": "other"}]}):
        (folder / "processor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match="cannot be used"):
            hub.chat_template(folder, "")


def test_a_folder_without_vocabulary_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no vocabulary: neither tokenizer.json nor vocab.json"):
        hub.find(str(folder))


def test_the_real_folder_without_vocabulary_is_refused(shared: Path) -> None:
    with pytest.raises(BadInput, match="no vocabulary"):
        hub.find(str(shared / "qwen/Qwen3-VL-4B-Instruct"))


def test_another_model_type_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}), encoding="utf-8")
    with pytest.raises(BadInput, match=r"model_type is 'llama'.*Qwen2-VL"):
        hub.find(str(folder))


def test_a_tokenizer_that_disagrees_with_the_configuration_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["image_token_id"] += 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BadInput, match=r"<\|image_pad\|> the id \d+, config.json says \d+"):
        ChatTokens(hub.find(str(folder)))


def test_a_template_that_thinks_is_refused(shared: Path, tmp_path: Path) -> None:
    """As those of Qwen3-VL-*-Thinking: the answer begins inside of a thought."""
    import shutil

    made = Path(shutil.copytree(shared / "qwen" / REAL["qwen3"], tmp_path / "thinking"))
    template = json.loads((made / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    ask_for = "{{- '<|im_start|>assistant\\n' }}"
    assert ask_for in template
    for prompt, thinks in (("<think>\\n", True), ("<think>\\n\\n</think>\\n\\n", False)):
        changed = template.replace(ask_for, ask_for.replace("' }}", f"{prompt}' }}}}"))
        for name, text in (
            ("chat_template.json", json.dumps({"chat_template": changed})),
            ("chat_template.jinja", changed),
        ):
            (made / name).write_text(text, encoding="utf-8")
            if thinks:
                with pytest.raises(BadInput, match=r"begins every answer with <think>.*the Instruct model"):
                    hub.find(str(made))
            else:
                hub.find(str(made))
            (made / "chat_template.json").unlink(missing_ok=True)
        (made / "chat_template.jinja").unlink()


def test_a_name_that_is_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither a folder here nor a hub id"):
        hub.find(str(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(BadInput, match="not in the local cache and could not be fetched"):
        hub.find("somebody/no-such-model")


def test_positions_and_ids_are_plain_tensors_of_the_right_kind(chat: ChatTokens) -> None:
    root = chat.root([(2, 2)])
    assert root.positions.shape == (3, len(root.ids))
    assert torch.from_numpy(root.positions).max() + 1 == root.next_position


def test_golden_image_token_counts(golden: Any) -> None:
    """Native canvases have the tokens that Qwen's own resizing gives, where that does not scale up."""
    for entry in golden["image_tokens"]:
        factor = entry["patch_size"] * entry["merge_size"]
        least = entry.get("min_pixels") or entry["shortest_edge"]
        most = (entry.get("max_pixels") or entry["longest_edge"]) // factor**2
        for case in entry["cases"]:
            size = case["width"], case["height"]
            if round(size[0] / factor) * round(size[1] / factor) * factor**2 >= least:
                canvas = plan_canvas(size, mode="native", size=None, max_tokens=most, factor=factor)
                assert canvas.tokens(factor) == case["tokens"], case
    grid = next(entry for entry in golden["image_grid"] if entry["model"] == "Qwen3-VL-4B")
    size = grid["image"]["width"], grid["image"]["height"]
    canvas = plan_canvas(size, mode="native", size=None, max_tokens=16384, factor=32)
    assert (canvas.width, canvas.height) == (grid["resized"]["width"], grid["resized"]["height"])
    assert [1, *canvas.grid(16)] == grid["image_grid_thw"][0]


@pytest.mark.parametrize("name", REAL.values())
def test_show_works_on_real_frames_with_a_real_folder_without_weights(
    shared: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from surgvqa import cli

    recipe = Path(__file__).parents[1] / "recipes/exp1_768.yaml"
    words = [
        f"model.name={shared / 'qwen' / name}",
        "data.format=jsonl",
        f"data.path={shared / 'real_frames.jsonl'}",
    ]
    assert cli.main(["show", str(recipe), *words, "--out", str(tmp_path)]) == 0
    side, tokens = {REAL["qwen2"]: (756, 729), REAL["qwen3"]: (768, 576)}[name]
    assert Image.open(tmp_path / "canvas-0.png").size == (side, side)
    page = (tmp_path / "tree.html").read_text(encoding="utf-8")
    assert page.count("<small>151655 @ ") == tokens
    assert f"<|image_pad|>×{tokens}" in capsys.readouterr().out
