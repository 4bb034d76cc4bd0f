"""Greedy answers over trees: every branch of every image in a pack grows by one token per forward pass.

prefill   root · Q1 · Q2 · Q3                 once, the image shared
step 1    a1   b1   c1                        one new token per branch, which sees its branch,
step 2    a2   b2   c2                        the root, and what it has said itself
step 3    a3   ∎    c3                        branches that have ended drop out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from surgvqa import attention
from surgvqa.model import base, image_features
from surgvqa.tree import Pack


@torch.inference_mode()
def greedy(
    model: Any,
    pack: Pack,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    attn: str = "sdpa",
    autocast: torch.dtype | None = None,
) -> list[list[int]]:
    """The most likely answer of each branch of a pack of asked branches, without its end of turn.

    Token for token what greedy decoding of one row per question gives.
    """
    qwen = base(model)
    device = pack.ids.device
    branches = len(pack.ends)
    answers: list[list[int]] = [[] for _ in range(branches)]
    stops = torch.tensor(list(stop_ids), device=device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        cache = DynamicCache(config=qwen.config.text_config)
        logits = qwen(
            input_ids=pack.ids,
            position_ids=pack.positions,
            mm_encoder_outputs={"image": image_features(model, pack.patches, pack.grids)},
            logits_to_keep=pack.ends,
            past_key_values=cache,
            use_cache=True,
            **attention.arguments(pack, attn),
        ).logits[0]
        # Row b of `sees`: which of the cached tokens branch b may look at.
        sees = _visible_from(pack)
        live = torch.arange(branches, device=device)
        position = pack.positions[0, 0, pack.ends] + 1
        for left in range(max_new_tokens, 0, -1):
            new = logits.argmax(-1)
            going = ~torch.isin(new, stops)
            live, new, sees, position = live[going], new[going], sees[going], position[going]
            if not len(live):
                break
            for branch, token in zip(live.tolist(), new.tolist(), strict=True):
                answers[branch].append(token)
            if left == 1:
                break
            sees = torch.cat([sees, torch.eye(len(live), dtype=torch.bool, device=device)], 1)
            logits = qwen(
                input_ids=new[None],
                position_ids=position.expand(3, 1, -1),
                attention_mask=sees[None, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[0]
            position = position + 1
    return answers


def _visible_from(pack: Pack) -> Tensor:
    """(branches, tokens) true where the last token of a branch sees a token of the pack."""
    index = torch.arange(pack.tokens, device=pack.ids.device)
    return (index[None, :] <= pack.ends[:, None]) & (pack.ends[:, None] < pack.visible_until[None, :])
