"""What training has to compute: useful FLOPs of a step, and the peak of the device that computes it.

    network ── cost_of ──▶ Cost          FLOPs per token, patch, logit and pair that attends
            ── StepCost(questions) ──▶   FLOPs of an optimizer step

A multiply-accumulate is two FLOPs. Counted are matrix products: linear layers, patch embedding, attention by
the pairs its mask allows. Norms, softmax, rotary positions, activations, the loss and the optimizer are not;
nor is what is computed again to save memory, or because a tree was cut to fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from surgvqa.model import PatchProjection, base
from surgvqa.plan import Group
from surgvqa.tree import Questions


@dataclass(frozen=True)
class Cost:
    """FLOPs, forward and backward, of one …"""

    token: float
    """… token in the language model's linear layers."""
    logit: float
    """… token whose logits are computed."""
    pair: float
    """… (row, column) that the language model's mask allows, over all layers and heads."""
    patch: float
    """… vision patch: embedding, blocks, and its share of the mergers."""
    patch_pair: float
    """… pair of patches of the same image, over all blocks and heads."""


class _Rows:
    """Adds up linear layers in the order in which rows pass through them."""

    def __init__(self, live: bool = False) -> None:
        self.flops = 0
        """Per row."""
        self.live = live
        """Whether something before here trains, so that gradients pass back through here."""

    def through(self, *parts: nn.Module) -> list[bool]:
        """Pass through parts side by side, each a sequence of layers; tells which outputs are live.

        A product costs 2 × its weight forward, once more for its input's gradient where the input is live,
        once more for its weight's where the weight trains. LoRA's A and B follow their frozen layer, so A
        sees the input's flag and B that of A.
        """
        outputs = []
        for part in parts:
            live = self.live
            for layer in part.modules():
                if isinstance(layer, (nn.Linear, nn.Conv3d, PatchProjection)):
                    passes = 1 + live + layer.weight.requires_grad
                    self.flops += 2 * layer.weight.numel() * passes
                live = live or any(weight.requires_grad for weight in layer.parameters(recurse=False))
            outputs.append(live)
        self.live = self.live or any(outputs)
        return outputs


def cost_of(network: Any) -> Cost:
    """The cost of training a network of model.adapt, weights or none (model.skeleton)."""
    qwen = base(network)
    visual, language = qwen.model.visual, qwen.model.language_model

    patches, patch_pair, live_after = _Rows(), 0, []
    patches.through(visual.patch_embed, getattr(visual, "pos_embed", nn.Identity()))
    for block in visual.blocks:
        attention = block.attn
        [qkv] = patches.through(attention.qkv)
        patch_pair += _attention(attention.config.num_heads * attention.head_dim, qkv, qkv, qkv)
        patches.through(attention.proj)
        patches.through(block.mlp)
        live_after.append(patches.live)
    patch = float(patches.flops)
    mergers = [(visual.merger, patches.live)]
    if hasattr(visual, "deepstack_merger_list"):
        taps = (live_after[index] for index in visual.deepstack_visual_indexes)
        mergers += zip(visual.deepstack_merger_list, taps, strict=True)
    for merger, live in mergers:
        merged = _Rows(live)
        merged.through(merger)
        patch += merged.flops / visual.spatial_merge_size**2

    image_live = any(weight.requires_grad for weight in visual.parameters())
    tokens, pair = _Rows(image_live or language.embed_tokens.weight.requires_grad), 0
    for layer in language.layers:
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value = tokens.through(attention.q_proj, attention.k_proj, attention.v_proj)
        width = attention.config.num_attention_heads * attention.head_dim
        pair += _attention(width, query, key, value)
        tokens.through(attention.o_proj)
        tokens.through(mlp.gate_proj, mlp.up_proj)
        tokens.through(mlp.down_proj)
    logits = _Rows(tokens.live)
    logits.through(qwen.lm_head)
    return Cost(tokens.flops, logits.flops, pair, patch, patch_pair)


def _attention(width: int, query: bool, key: bool, value: bool) -> int:
    """FLOPs per pair of queries on keys and of that on values, `width` being heads × head width.

    Each of the two products has a gradient for each of its sides, where that side is live.
    """
    return 2 * width * (2 + query + key + (query or key) + value)


class StepCost:
    """Useful FLOPs of optimizer steps: a tree's image once, each of its questions once."""

    def __init__(self, network: Any, questions: Questions) -> None:
        cost, self.image = cost_of(network), questions.image
        patch, grids = questions.chat.folder.patch, dict[str, list[tuple[int, int]]]()
        for example in questions.examples:  # their images come in the order of `questions.image`
            if example.image_key not in grids:
                grids[example.image_key] = [questions.canvases[i.key].grid(patch) for i in example.images]
        root, branch = questions.root_tokens, questions.branch_tokens
        self.per_image = (
            cost.token * root
            + cost.pair * root * (root + 1) / 2
            + cost.patch * np.array([sum(h * w for h, w in images) for images in grids.values()])
            + cost.patch_pair * np.array([sum((h * w) ** 2 for h, w in images) for images in grids.values()])
        )
        """(images,) FLOPs of each root."""
        self.per_question = (
            cost.token * branch
            + cost.pair * (branch * root[self.image] + branch * (branch + 1) / 2)
            + cost.logit * questions.answer_tokens
        )
        """(questions,) FLOPs of each branch."""

    def step(self, trees: Sequence[Group]) -> float:
        """FLOPs of the trees of Plan.step, on all processes together."""
        roots = self.image[[tree[0] for tree in trees]]
        return float(self.per_image[roots].sum() + self.per_question[list(chain.from_iterable(trees))].sum())


class Speed:
    """How fast steps are, and how that compares with what the device could do."""

    def __init__(
        self, network: Any, questions: Questions, device: torch.device, precision: str, world: int
    ) -> None:
        self.cost, self.device, self.world = StepCost(network, questions), device, world
        self.cuda = device.type == "cuda"
        self.peak = peak(torch.cuda.get_device_name(device), precision) if self.cuda else None

    def of(self, trees: Sequence[Group], seconds: float) -> dict[str, float]:
        """Questions per second; useful TFLOP/s per process; on GPUs, questions per GPU-hour and memory; and
        where the peak is known, model FLOPs utilisation (MFU) as a share of 1."""
        questions_per_s = sum(map(len, trees)) / seconds
        flops_per_s = self.cost.step(trees) / seconds / self.world
        found = {"questions_per_s": questions_per_s, "tflops": flops_per_s / 1e12}
        if self.cuda:
            found["questions_per_gpu_hour"] = 3600 * questions_per_s / self.world
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.peak:
            found["mfu"] = flops_per_s / self.peak
        return found


_BF16_TFLOPS = (
    # Ampere. Data sheets of A100, A10, A30, A40; white paper "NVIDIA Ampere GA102", appendix A.
    (r"A100(-\w+-\d+GB| 80GB PCIe)", 312.0),
    (r"A10", 125.0),
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"RTX A6000", 154.8),
    (r"GeForce RTX 3090", 71.0),
    # Ada. Data sheets of L4, L40, L40S; white paper "NVIDIA Ada GPU Architecture", appendix A.
    (r"L4", 121.0),
    (r"L40", 181.0),
    (r"L40S", 362.0),
    (r"GeForce RTX 4090", 165.2),
    # Hopper, Blackwell. Data sheets of H100, H200, HGX B200, which give twice this, with sparsity.
    (r"H100 (PCIe|80GB HBM2e)", 756.0),
    (r"H100 NVL", 835.0),
    (r"H100 80GB HBM3", 989.0),
    (r"H200", 989.0),
    (r"H200 NVL", 835.0),
    (r"B200", 2250.0),
)
"""Whole names without "NVIDIA", so that a slice (MIG), a laptop's or a cut-down kin is not taken for the
device itself, and dense bf16 tensor-core TFLOP/s with fp32 accumulation."""


def peak(device_name: str, precision: str) -> float | None:
    """Dense FLOP/s of a device by torch.cuda.get_device_name; None where unknown, or not in bf16."""
    if precision != "bf16":
        return None
    name = device_name.removeprefix("NVIDIA ")
    return next((1e12 * tflops for pattern, tflops in _BF16_TFLOPS if re.fullmatch(pattern, name)), None)
