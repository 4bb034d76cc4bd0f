"""Trees compute what separate rows compute: masks, gradients, answers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from surgvqa import attention, decode, model
from surgvqa.datasets import Example, ImageRef
from surgvqa.loss import TreeLoss
from surgvqa.tokens import Branch, ChatTokens
from surgvqa.tree import Tree, pack

QUESTIONS = [
    ("How many polyps are there?", "2", "count"),
    ("Is there bleeding?", "yes", "yes_no"),
    ("Which instrument is used?", "a pair of scissors", "which"),
    ("Where is the polyp?", "upper left", "where"),
    ("Does the word assistant in a question confuse the labels?", "no; it does not", "yes_no"),
    ("What colour is it?", "pink", "colour"),
    ("Is text visible?", "no", "yes_no"),
    ("What is the state of the jaw?", "open", "state"),
    ("Any artefact?", "green box", "which"),
]


def example(number: int, images: int = 1) -> Example:
    question, answer, kind = QUESTIONS[number % len(QUESTIONS)]
    return Example(str(number), (ImageRef("x"),) * images, question, (answer,), kind)


class Row:
    """One question as transformers itself takes it, from the chat template's text on."""

    def __init__(
        self, chat: ChatTokens, example: Example, patches: np.ndarray, grids: Sequence[tuple[int, int]]
    ):
        text = chat.render(chat.conversation(example))
        prompt = chat.render(chat.conversation(example)[:-1], add_generation_prompt=True)
        merge = chat.folder.merge
        for rows, columns in grids:
            pads = "<|pad|>" * (rows // merge * columns // merge)
            text, prompt = (part.replace("<|image_pad|>", pads, 1) for part in (text, prompt))
        text, prompt = (part.replace("<|pad|>", "<|image_pad|>") for part in (text, prompt))
        self.ids = torch.tensor([chat.tokenizer(text, add_special_tokens=False)["input_ids"]])
        asked = len(chat.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        self.labels = self.ids.clone()
        self.labels[0, :asked] = -100
        self.labels[0, -1] = -100  # the line feed behind the end of turn
        self.asked = self.ids[:, :asked]
        self.vision = {
            "pixel_values": torch.from_numpy(patches),
            "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        }
        self.image_token = chat.folder.special["<|image_pad|>"]

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "mm_token_type_ids": (ids == self.image_token).int(), **self.vision}


def forest(
    chat: ChatTokens, trees: Sequence[tuple[int, Sequence[tuple[int, int]]]]
) -> tuple[list[Tree], list[Row]]:
    """Trees of (branches, image sizes in tokens as (columns, rows)) and the same questions as rows."""
    made, rows, number = [], [], 0
    for branches, sizes in trees:
        factor = chat.folder.factor
        pictures = [noise_image(w * factor, h * factor, number + i) for i, (w, h) in enumerate(sizes)]
        patches = np.concatenate([chat.patches(picture) for picture in pictures])
        merge = chat.folder.merge
        grids = [(h * merge, w * merge) for w, h in sizes]
        examples = [example(number + i, len(sizes)) for i in range(branches)]
        number += branches
        root = chat.root((h, w) for w, h in sizes)
        made.append(Tree(root, chat.branches(examples), [1.0] * branches, patches, grids))
        rows += [Row(chat, question, patches, grids) for question in examples]
    return made, rows


def gradients(loss: Tensor, network: torch.nn.Module) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def tiny(chat: ChatTokens, sdpa: bool = False) -> Any:
    """A tiny model; with `sdpa`, one that is transformers' own throughout."""
    network = model.build(chat.folder, seed=3)
    with torch.no_grad():
        # Fresh weights are so small that attention hardly matters: make it matter.
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    if sdpa:
        network.config.text_config._attn_implementation = "sdpa"
    return network


MIXES = {
    "one branch": [(1, [(3, 2)])],
    "nine branches": [(9, [(4, 3)])],
    "several images in a pack, mixed sizes": [(3, [(4, 2)]), (1, [(1, 1)]), (5, [(2, 5)])],
    "several images in a root": [(2, [(2, 2), (3, 1), (1, 4)]), (4, [(3, 3), (3, 3)])],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.fault("F25")
def test_gradients_of_trees_equal_those_of_rows_through_transformers(chat: ChatTokens, mix: str) -> None:
    trees, rows = forest(chat, MIXES[mix])
    network = tiny(chat)
    tree_loss = TreeLoss(network, attn="sdpa", autocast=None)(pack(trees))
    ours = gradients(tree_loss, network)

    reference = tiny(chat, sdpa=True)
    total = torch.zeros(())
    for row in rows:
        supervised = (row.labels != -100).sum()
        total = total + reference(**row.inputs(row.ids), labels=row.labels).loss * supervised
    theirs = gradients(total, reference)

    assert tree_loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert ours.keys() == theirs.keys()
    assert any("visual" in name for name in ours)
    difference = sum((ours[name] - theirs[name]).double().square().sum() for name in ours).sqrt()
    size = sum(theirs[name].double().square().sum() for name in ours).sqrt()
    assert difference / size <= 1e-5
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-7 * size, name


def test_every_attention_path_gives_the_logits_of_the_dense_mask(chat: ChatTokens) -> None:
    trees, _ = forest(chat, [(3, [(4, 2)]), (1, [(2, 2)])])
    packed = pack(trees)
    network = tiny(chat)
    reference = tiny(chat, sdpa=True)
    with torch.no_grad():
        # transformers' own forward pass, from pixels on, with the mask spelt out.
        features = reference.model.get_image_features(packed.patches, packed.grids, return_dict=True)
        dense = reference.model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            mm_encoder_outputs={"image": features},
            attention_mask=packed.mask()[None, None],
        ).last_hidden_state[0]
        sdpa = model.hidden_states(network, packed, "sdpa")
        flex = model.hidden_states(network, packed, "flex")
        padded = model.hidden_states(network, pack(trees, multiple=128), "flex")
    torch.testing.assert_close(sdpa, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flex, dense, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(padded[: packed.tokens], flex, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("multiple", [1, attention.BLOCK])
def test_the_block_mask_is_the_one_that_flexattention_makes_of_the_dense_mask(
    chat: ChatTokens, multiple: int
) -> None:
    trees, _ = forest(chat, [(9, [(9, 9)]), (1, [(2, 2)]), (9, [(24, 20)]), (2, [(1, 1)])])
    packed = pack(trees, multiple=multiple)
    assert packed.tokens > 4 * attention.BLOCK
    assert packed.tokens % multiple == 0
    ours = attention.block_mask(packed)
    theirs = create_block_mask(ours.mask_mod, None, None, packed.tokens, packed.tokens, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    for counts, own, their in (
        (ours.kv_num_blocks, ours.kv_indices, theirs.kv_indices),
        (ours.full_kv_num_blocks, ours.full_kv_indices, theirs.full_kv_indices),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            assert own[0, 0, row, :count].tolist() == their[0, 0, row, :count].tolist()
    assert (ours.full_kv_num_blocks > 0).any()
    assert ours.sparsity() > 0


def test_the_mask_is_self_and_ancestors() -> None:
    """Against the definition: j <= i, and segment(j) is segment(i) or an ancestor of it."""

    def ids(n: int) -> np.ndarray:
        return np.zeros(n, np.int32)

    from surgvqa.tokens import Root

    nested = Branch(ids(3), 3, 0, (Branch(ids(2), 0, 2), Branch(ids(1), 0, 1, (Branch(ids(2), 0, 2),))))
    root = Root(ids(4), np.zeros((3, 4), np.int32), 4, np.empty(0, np.int64))
    patches = np.zeros((1, 1), np.float32)
    trees = [
        Tree(root, [nested, Branch(ids(2), 1, 1)], [1.0] * 4, patches, [(1, 1)]),
        Tree(root, [Branch(ids(2), 1, 1)], [1.0], patches, [(1, 1)]),
    ]
    segment = [0] * 4 + [1] * 3 + [2] * 2 + [3] + [4] * 2 + [5] * 2 + [6] * 4 + [7] * 2
    ancestors = {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 3}, 4: {0, 1, 3, 4}, 5: {0, 5}, 6: {6}, 7: {6, 7}}
    packed = pack(trees)
    assert packed.tokens == len(segment)
    expected = [
        [j <= i and segment[j] in ancestors[segment[i]] for j in range(len(segment))]
        for i in range(len(segment))
    ]
    assert packed.mask().tolist() == expected
    assert packed.positions[0, 0].tolist() == [0] * 4 + [4, 5, 6, 7, 8, 7, 8, 9, 4, 5] + [0] * 4 + [4, 5]
    assert packed.ends.tolist() == [6, 8, 9, 11, 13, 19]


def test_candidate_answers_as_children_cost_what_they_cost_alone(chat: ChatTokens) -> None:
    """A question whose branches are its possible answers: each one's nats equal those of its own row."""
    trees, _ = forest(chat, [(1, [(3, 2)])])
    question = trees[0].branches[0]
    answers = [chat.branches([replace(example(0), answers=(text,))])[0] for text in ("2", "none at all", "0")]
    children = tuple(Branch(whole.ids[whole.prompt :], 0, whole.answer) for whole in answers)
    asked = replace(question.asked, children=children)
    network = tiny(chat)
    loss = TreeLoss(network, attn="sdpa", autocast=None)
    with torch.no_grad():
        for index in range(len(children)):
            weights = [float(index == other) for other in range(len(children))]
            together = loss(pack([replace(trees[0], branches=[asked], weights=weights)]))
            alone = loss(pack([replace(trees[0], branches=[answers[index]], weights=[1.0])]))
            assert together.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("rows_at_once", [3, 256])
def test_label_probabilities_equal_each_label_as_a_row_through_transformers(
    chat: ChatTokens, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(decode, "_ROWS", rows_at_once)
    sets = [("2", "2 polyps", "none at all"), ("yes", "no"), ("upper left", "upper", "2"), ("no",)]
    trees, number, expected = [], 0, []
    reference = tiny(chat, sdpa=True)
    for tree in forest(chat, [(3, [(4, 3)]), (1, [(2, 2)]), (2, [(2, 1), (1, 3)]), (1, [(1, 1)])])[0]:
        asked = [example(number + i, len(tree.grids)) for i in range(len(tree.branches))]
        labels = [sets[(number + i) % len(sets)] for i in range(len(asked))]
        number += len(asked)
        branches = chat.candidates(asked, labels)
        trees.append(replace(tree, branches=branches, weights=[1.0] * sum(map(len, labels))))
        for question, own in zip(asked, labels, strict=True):
            for label in own:
                row = Row(chat, replace(question, answers=(label,)), tree.patches, tree.grids)
                with torch.no_grad():
                    loss = reference(**row.inputs(row.ids), labels=row.labels).loss
                expected.append(-float(loss) * int((row.labels != -100).sum()))
    first, second = (child.ids[:-1].tolist() for child in trees[0].branches[0].children[:2])
    assert second[: len(first)] == first  # one label begins as another does
    found = decode.log_probabilities(tiny(chat), pack(trees))
    assert len(set(expected)) == len(expected) == 17
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    flex = decode.log_probabilities(tiny(chat), pack(trees), attn="flex")
    assert flex.tolist() == pytest.approx(expected, rel=1e-4)


def test_positions_equal_the_models_own(chat: ChatTokens) -> None:
    trees, rows = forest(chat, [(2, [(4, 2)]), (1, [(2, 2), (3, 5)])])
    packed = pack(trees)
    network = tiny(chat, sdpa=True)
    row = iter(rows)
    for tree, (start, _, _) in zip(trees, packed.spans, strict=True):
        at = root_end = start + len(tree.root.ids)
        for branch in tree.branches:
            own = next(row)
            inputs = own.inputs(own.ids)
            expected, _ = network.model.get_rope_index(
                own.ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
            )
            ids = torch.cat([packed.ids[:, start:root_end], packed.ids[:, at : at + len(branch.ids)]], 1)
            positions = torch.cat(
                [packed.positions[:, :, start:root_end], packed.positions[:, :, at : at + len(branch.ids)]], 2
            )
            assert torch.equal(ids, own.ids)
            assert torch.equal(positions, expected)
            at += len(branch.ids)


def test_tree_decoding_equals_generate_on_separate_rows(chat: ChatTokens) -> None:
    trees, rows = forest(chat, [(5, [(4, 3)]), (1, [(2, 2)]), (3, [(2, 1), (1, 3)])])
    asked = [replace(tree, branches=[branch.asked for branch in tree.branches]) for tree in trees]
    network = tiny(chat)
    answers = decode.greedy(network, pack(asked), stop_ids=chat.stop_ids, max_new_tokens=12)
    reference = tiny(chat, sdpa=True)
    for answer, row in zip(answers, rows, strict=True):
        generated = reference.generate(
            **row.inputs(row.asked),
            attention_mask=torch.ones_like(row.asked),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(chat.stop_ids),
            pad_token_id=chat.stop_ids[1],
            repetition_penalty=1.0,
        )[0, row.asked.shape[1] :].tolist()
        assert answer == [token for token in generated if token not in chat.stop_ids]
    assert len({tuple(answer) for answer in answers}) > 1


def test_weights_scale_each_answer_and_zero_adds_nothing(chat: ChatTokens) -> None:
    trees, _ = forest(chat, [(2, [(2, 2)])])
    loss = TreeLoss(tiny(chat), attn="sdpa", autocast=None)

    def nats(*weights: float) -> float:
        return loss(pack([replace(trees[0], weights=list(weights))])).item()

    assert nats(2.0, 3.0) == pytest.approx(2 * nats(1.0, 0.0) + 3 * nats(0.0, 1.0), rel=1e-5)
    assert nats(0.0, 0.0) == 0.0


def test_nothing_in_a_step_waits_for_the_device(chat: ChatTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no numbers: whatever asks for one (item, tolist, nonzero, …) fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta
    trees, _ = forest(chat, [(3, [(4, 2)]), (1, [(2, 2)]), (2, [(2, 1), (1, 3)])])
    network = tiny(chat).to("meta").train()
    packed = pack(trees, multiple=attention.BLOCK).to(torch.device("meta"))
    loss = TreeLoss(network, attn="sdpa", autocast=None)(packed)
    loss.backward()
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in network.parameters())
    assert attention.block_mask(packed).kv_indices.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def test_many_targets_go_through_the_vocabulary_in_chunks(
    chat: ChatTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees, _ = forest(chat, [(5, [(2, 2)]), (3, [(1, 2)])])
    network = tiny(chat)
    loss = TreeLoss(network, attn="sdpa", autocast=None)
    whole = gradients(loss(pack(trees)), network)
    monkeypatch.setattr("surgvqa.loss.CHUNK", 7)
    chunked = gradients(loss(pack(trees)), network)
    assert len(pack(trees).targets) > 14
    for name, gradient in whole.items():
        assert (chunked[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


def test_compiled_layers_serve_packs_of_any_number_of_trees(chat: ChatTokens) -> None:
    """Without being compiled anew for each, which ends after eight."""
    network = tiny(chat).train()
    loss = TreeLoss(network, attn="sdpa", autocast=None)
    mixes = [[(branches, [(2, 2)])] * trees for trees in (1, 2, 3, 4, 5, 6) for branches in (1, 3)]
    expected = [loss(pack(forest(chat, mix)[0])).item() for mix in mixes]
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in model.decoder_layers(network):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=counter)
    found = []
    for index, mix in enumerate(mixes):
        found.append(loss(pack(forest(chat, mix)[0])).item())
        if index == 3:
            frames = counter.frame_count
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < counter.frame_count == frames, "nothing new after the first packs"
