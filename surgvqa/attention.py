"""How a pack attends: the same rule (see tree.py) through three kernels, behind transformers' own switch.

    training and prefill, CPU    SDPA tree by tree: the root causally, its branches against root and selves
    training and prefill, CUDA   FlexAttention with a block mask made from `visible_until`
    decoding                     SDPA with the rows of the mask that belong to the new tokens

The function is registered with transformers' AttentionInterface under NAME and set for the language model
alone; the vision tower keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from surgvqa.tree import Pack

NAME = "surgvqa_tree"

Layout = Sequence[tuple[int, int, int, Tensor | None]]
"""(start, end of root, end, mask (branch tokens, tree tokens)) of each tree; without a mask where the
whole tree is one causal row."""


def layout(pack: Pack) -> Layout:
    """What the SDPA kernel needs to know of a pack, made once for all layers."""
    trees: list[tuple[int, int, int, Tensor | None]] = []
    for start, root_end, end in pack.spans:
        until = pack.visible_until[start:end]
        if bool((until == end).all()):
            trees.append((start, root_end, end, None))
            continue
        row = torch.arange(root_end, end, device=until.device)[:, None]
        column = torch.arange(start, end, device=until.device)[None, :]
        trees.append((start, root_end, end, (column <= row) & (row < until[None, :])))
    return trees


def block_mask(pack: Pack) -> BlockMask:
    """What FlexAttention needs to know of a pack; compiled on the GPU, where no dense mask is made."""
    until = pack.visible_until

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < until[column])

    return create_block_mask(
        visible, None, None, pack.tokens, pack.tokens, device=until.device, _compile=until.is_cuda
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
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, heads, tokens, width) queries over (1, key heads, …) keys → ((1, tokens, heads, width), None)."""
    # Rotary positions and norms of fp32 masters leave queries and keys in fp32 under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(attention_mask, BlockMask):
        kernel = _compiled_flex() if query.is_cuda else flex_attention
        out = kernel(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if layout is None:
        if attention_mask is None:
            raise ValueError("tree attention needs a mask or a layout")
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
        return out.transpose(1, 2), None
    parts = []
    for start, root_end, end, mask in layout:
        causal_end = end if mask is None else root_end
        rows = slice(start, causal_end)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, rows], key[:, :, rows], value[:, :, rows], None, dropout, True, scale=scaling
            )
        )
        if mask is not None:
            tree = slice(start, end)
            parts.append(
                F.scaled_dot_product_attention(
                    query[:, :, root_end:end],
                    key[:, :, tree],
                    value[:, :, tree],
                    mask,
                    dropout,
                    scale=scaling,
                )
            )
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register(NAME, tree_attention)
