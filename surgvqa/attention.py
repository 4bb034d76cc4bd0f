"""How a pack attends: the same rule (see tree.py) through three kernels, behind transformers' own switch.

    training and prefill, CPU    SDPA tree by tree: the root causally, its branches against root and selves
    training and prefill, CUDA   FlexAttention with a block mask made from `visible_until`
    decoding                     SDPA with the rows of the mask that belong to the new tokens

The function is registered with transformers' AttentionInterface under NAME and set for the language model
alone; the vision tower keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from surgvqa.tree import BLOCK, Pack

NAME = "surgvqa_tree"


@dataclass(frozen=True)
class Layout:
    """Where the trees of a pack are; opaque to torch.compile, which would look for each other layout anew."""

    trees: Sequence[tuple[int, int, int, Tensor | None]]
    """(start, end of root, end, mask (branch tokens, tree tokens)) of each; without a mask where the whole
    tree is one causal row."""


def layout(pack: Pack) -> Layout:
    """What the SDPA kernel needs to know of a pack, made once for all layers."""
    trees: list[tuple[int, int, int, Tensor | None]] = []
    for start, root_end, end in pack.spans:
        if root_end == end:
            trees.append((start, end, end, None))
            continue
        until = pack.visible_until[start:end]
        row = torch.arange(root_end, end, device=until.device)[:, None]
        column = torch.arange(start, end, device=until.device)[None, :]
        trees.append((start, root_end, end, (column <= row) & (row < until[None, :])))
    return Layout(trees)


def block_mask(pack: Pack) -> BlockMask:
    """What FlexAttention needs to know of a pack, from `pack.blocks`: no dense mask is made."""
    until = pack.visible_until

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < until[column])

    def tiles(kind: int) -> tuple[Tensor, Tensor]:
        """How many tiles of a kind each row of tiles has (1, 1, rows), and which (1, 1, rows, columns)."""
        of_kind = (pack.blocks == kind).to(torch.int32)
        first = of_kind.argsort(dim=1, descending=True, stable=True).to(torch.int32)
        return of_kind.sum(1, dtype=torch.int32)[None, None], first[None, None]

    return BlockMask.from_kv_blocks(
        *tiles(1),
        *tiles(2),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(pack.tokens, pack.tokens),
    )


def arguments(pack: Pack, attn: str) -> dict[str, Any]:
    """The keyword arguments that make a model attend over a pack; `attn` is `sdpa` or `flex`."""
    if attn == "flex":
        return {"attention_mask": block_mask(pack)}
    return {"attention_mask": None, "layout": layout(pack)}


@cache
def _compiled_flex() -> Any:
    # Packs differ in length: one kernel for all of them.
    return torch.compile(flex_attention, dynamic=True)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, heads, tokens, width) queries over (1, key heads, …) keys → ((1, tokens, heads, width), None)."""
    # Rotary positions and norms of fp32 masters leave queries and keys in fp32 under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(attention_mask, BlockMask):
        # Inside a compiled layer it is compiled as a part of that.
        alone = query.is_cuda and not torch.compiler.is_compiling()
        kernel = _compiled_flex() if alone else flex_attention
        out = kernel(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    if layout is None:
        if attention_mask is None:
            raise ValueError("tree attention needs a mask or a layout")
        return _masked(query, key, value, attention_mask[0, 0], scaling).transpose(1, 2), None
    return _tree_by_tree(query, key, value, layout, scaling).transpose(1, 2), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it has none
def _tree_by_tree(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    parts = []
    for start, root_end, end, mask in layout.trees:
        rows, tree = slice(start, root_end), slice(start, end)
        parts.append(_causal(query[:, :, rows], key[:, :, rows], value[:, :, rows], scaling))
        if mask is not None:
            branches = query[:, :, root_end:end]
            parts.append(_masked(branches, key[:, :, tree], value[:, :, tree], mask, scaling))
    return torch.cat(parts, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """`mask` (rows, columns). Heads that share keys become more rows of one head: no key is copied."""
    _, heads, rows, width = query.shape
    repeats = heads // key.shape[1]
    grouped = query.reshape(1, key.shape[1], repeats * rows, width)
    out = F.scaled_dot_product_attention(grouped, key, value, mask.repeat(repeats, 1), scale=scaling)
    return out.reshape(1, heads, rows, width)


AttentionInterface.register(NAME, tree_attention)
