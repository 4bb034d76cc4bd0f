"""The cost formula counts what torch's own counter counts, and only once what trees share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TOPICS, noise_image
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from surgvqa import hub, model, recipe
from surgvqa.datasets import Example, ImageRef
from surgvqa.datasets.kvasir_vqa import QUESTION_TYPES
from surgvqa.flops import StepCost, cost_of, peak
from surgvqa.letterbox import plan_canvas
from surgvqa.loss import TreeLoss
from surgvqa.recipe import Lora
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

ROOT = Path(__file__).parents[1]
LORA: dict[str, Any] = {
    "tune": "lora", "train_vision": False, "train_merger": False, "modules": Lora().modules, "rank": 4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "full, all": {"tune": "full", "train_vision": True, "train_merger": True},
    "full, frozen tower": {"tune": "full", "train_vision": False, "train_merger": True},
    "full, frozen tower and merger": {"tune": "full", "train_vision": False, "train_merger": False},
    "full, frozen merger": {"tune": "full", "train_vision": True, "train_merger": False},
    "lora": LORA,
    "lora, merger": LORA | {"train_merger": True},
    "lora, tower": LORA | {"train_vision": True},
    "lora, tower and merger": LORA | {"train_vision": True, "train_merger": True},
    "lora on queries": LORA | {"modules": ["q_proj"]},
    "lora on keys and values": LORA | {"modules": ["k_proj", "v_proj"]},
    "lora on values": LORA | {"modules": ["v_proj"]},
    "lora on the last product": LORA | {"modules": ["down_proj"]},
    "lora within the tower": LORA | {"modules": ["visual.blocks.*.attn.proj", "o_proj"]},
}


def asked(chat: ChatTokens, images: list[tuple[tuple[ImageRef, ...], int]], side: int) -> Questions:
    """Questions about images on square canvases; for each entry its images and how many questions."""
    examples = [
        Example(f"{number}-{place}", refs, TOPICS[place][0], (TOPICS[place][1][-1],))
        for number, (refs, count) in enumerate(images)
        for place in range(count)
    ]
    canvas = plan_canvas((100, 80), mode="letterbox", size=side, max_tokens=None, factor=chat.folder.factor)
    canvases = {ref.key: canvas for refs, _ in images for ref in refs}
    return Questions(examples, chat, canvases)


@pytest.fixture(scope="module")
def questions(chat: ChatTokens, tmp_path_factory: pytest.TempPathFactory) -> Questions:
    """Of 3, 1 and 2 questions about one image, another and two; on canvases of two sizes."""
    refs = []
    for number in range(4):
        path = tmp_path_factory.mktemp("images") / f"{number}.png"
        noise_image(100, 80, number).save(path)
        refs.append(ImageRef(f"{number}", path))
    made = asked(chat, [((refs[0],), 3), ((refs[1],), 1), ((refs[2], refs[3]), 2)], 128)
    wide = plan_canvas((100, 80), mode="native", size=None, max_tokens=6, factor=chat.folder.factor)
    return Questions(made.examples, chat, made.canvases | {"1": wide, "2": wide})


def counted(network: Any, questions: Questions, trees: list[list[int]]) -> int:
    """What torch counts in one forward and backward pass over a pack of these trees."""
    for module in network.modules():  # PEFT's copy of a tower that trains has a configuration of its own
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._attn_implementation = "eager"  # matrix products, which are counted
    loss = TreeLoss(network, attn="sdpa", autocast=None)
    packed = questions.pack(trees)
    with FlopCounterMode(display=False) as counter:
        loss(packed).backward()
    return int(counter.get_total_flops())


def dense(network: Any, questions: Questions, trees: list[list[int]]) -> float:
    """The formula, had the mask allowed the whole square, which is what eager attention computes."""
    packed = questions.pack(trees)
    unseen = packed.tokens**2 - int(packed.mask().sum())
    return StepCost(network, questions).step(trees) + cost_of(network).pair * unseen


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_torch_counts(questions: Questions, case: str) -> None:
    network = model.adapt(model.build(questions.chat.folder), **CASES[case])
    trees = [[0, 2, 1], [3], [5, 4]]
    assert counted(network, questions, trees) == dense(network, questions, trees)


def test_a_row_by_itself_is_what_torch_counts(questions: Questions) -> None:
    network = model.adapt(model.build(questions.chat.folder), **LORA)
    assert counted(network, questions, [[2]]) == dense(network, questions, [[2]])


def test_no_weights_are_needed(chat: ChatTokens) -> None:
    for settings in (CASES["full, all"], CASES["lora, tower"], LORA):
        network = model.adapt(model.build(chat.folder), **settings)
        assert cost_of(model.adapt(model.skeleton(chat.folder), **settings)) == cost_of(network)


def test_a_tree_saves_its_image_for_each_further_question(questions: Questions) -> None:
    network = model.adapt(model.build(questions.chat.folder), **LORA)
    work = StepCost(network, questions)
    tree, rows = work.step([[0, 1, 2]]), work.step([[0], [1], [2]])
    assert rows - tree == pytest.approx(2 * work.per_image[0], rel=1e-12)
    assert work.step([[0, 1, 2], [3], [4, 5]]) == pytest.approx(tree + work.step([[3], [4, 5]]), rel=1e-12)


def check_saving(questions: Questions) -> float:
    """FLOPs per question of LoRA on one tree of all; the saving lies within its bounds."""
    network = model.adapt(model.skeleton(questions.chat.folder), **LORA | {"rank": 16})
    work, n = StepCost(network, questions), len(questions)
    tree, rows = work.step([list(range(n))]), work.step([[number] for number in range(n)])
    root, branches = int(questions.root_tokens[0]), int(questions.branch_tokens.sum())
    # Tokens alone would give the lower bound, but the tower is saved too; n times if branches were free.
    assert (n * root + branches) / (root + branches) < rows / tree < n
    return tree / n


def test_rows_cost_more_than_their_tokens_say(chat: ChatTokens) -> None:
    check_saving(asked(chat, [((ImageRef("x"),), 9)], 512))


def kvasir(folder: Path, size: int, count: int) -> Questions:
    """Questions of one image of Kvasir-VQA, with the prompts of recipes/exp1_768.yaml."""
    prompt = recipe.load(ROOT / "recipes/exp1_768.yaml").prompt
    chat = ChatTokens(hub.find(str(folder)), system=prompt.system, instructions=prompt.instructions)
    rows = [
        ("Is there text?", "yes"),
        ("What is the size of the polyp?", "5-10mm"),
        ("Are there any abnormalities in the image? Check all that are present.", "polyp"),
        ("How many polyps are in the image?", "1"),
        ("Where in the image is the abnormality?", "center; lower-left"),
        ("What color is the abnormality? If more than one separate with ;", "pink; red"),
        ("What type of procedure is the image taken from?", "colonoscopy"),
        ("Have all polyps been removed?", "no"),
        ("What type of polyp is present?", "paris is"),
    ]
    examples = [
        Example(question, (ImageRef("x"),), question, (answer,), QUESTION_TYPES[question])
        for question, answer in rows[:count]
    ]
    canvas = plan_canvas((900, 900), mode="letterbox", size=size, max_tokens=None, factor=chat.folder.factor)
    return Questions(examples, chat, {"x": canvas})


def test_cost_of_a_question_to_the_real_models(shared: Path) -> None:
    """Published in docs/benchmarks.md."""
    qwen2, qwen3 = (shared / "qwen" / name for name in ("Qwen2-VL-7B-Instruct", "Qwen3-VL-8B-Instruct"))
    assert check_saving(kvasir(qwen2, 768, 8)) == pytest.approx(4.0e12, rel=0.02)
    assert check_saving(kvasir(qwen2, 768, 9)) == pytest.approx(3.6e12, rel=0.02)
    assert check_saving(kvasir(qwen3, 768, 8)) == pytest.approx(3.3e12, rel=0.03)
    assert check_saving(kvasir(qwen3, 1728, 8)) == pytest.approx(15.6e12, rel=0.03)  # 2,916 tokens


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("A100-PCIE-40GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA B200", 2250),
    ],
)  # fmt: skip
def test_known_peaks(name: str, tflops: float) -> None:
    assert peak(name, "bf16") == pytest.approx(tflops * 1e12)
    assert peak(name, "fp32") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "Tesla V100-SXM2-32GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10G", "AMD Instinct MI300X", "cpu", "",
    ],
)  # fmt: skip
def test_a_device_that_is_not_known_has_no_peak(name: str) -> None:
    assert peak(name, "bf16") is None
