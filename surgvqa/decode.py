"""Answers over trees: written by the model, or chosen among labels.

Greedy answers: every branch of every image in a pack grows by one token per forward pass.

prefill   root · Q1 · Q2 · Q3                 once, the image shared
step 1    a1   b1   c1                        one new token per branch, which sees its branch,
step 2    a2   b2   c2                        the root, and what it has said itself
step 3    a3   ∎    c3                        branches that have ended drop out

Labels: the possible answers of a question are children of its branch, all scored in one forward pass.

          root · Q1 · yes ∎ · no ∎ · Q2 · none ∎ · one ∎ · two ∎
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from surgvqa.endings import NumericFailure
from surgvqa.model import base, hidden_states
from surgvqa.tree import Pack

_ROWS = 256
"""Places whose logits are in memory at once: 150 MiB in fp32 for a vocabulary of 152k tokens."""


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

    Token for token what greedy decoding of one row per question gives. Raises NumericFailure where the model
    gives NaN.
    """
    qwen = base(model)
    device, tokens, branches = pack.ids.device, pack.tokens, len(pack.ends)
    stops = torch.tensor(list(stop_ids), device=device)
    live = torch.arange(branches, device=device)
    said = torch.full((branches, max_new_tokens), -1, device=device)
    # Row b: which of the cached tokens branch b may look at; those to come are its own.
    sees = torch.zeros((branches, tokens + branches * max_new_tokens), dtype=torch.bool, device=device)
    sees[:, :tokens] = _visible_from(pack)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        cache = DynamicCache(config=qwen.config.text_config)
        logits = qwen.lm_head(hidden_states(model, pack, attn, cache)[pack.ends])
        position = pack.positions[0, 0, pack.ends]
        cached = tokens
        for step in range(max_new_tokens):
            new = logits.argmax(-1)
            _refuse_nan(logits.gather(-1, new[:, None]))
            going = torch.isin(new, stops, invert=True).nonzero()[:, 0]
            if not len(going):
                break
            live, new, position = live[going], new[going], position[going] + 1
            said[live, step] = new
            sees[live, cached + torch.arange(len(live), device=device)] = True
            cached += len(live)
            if step + 1 < max_new_tokens:
                hidden = qwen.model.language_model(
                    inputs_embeds=qwen.get_input_embeddings()(new)[None],
                    position_ids=position.expand(3, 1, -1),
                    attention_mask=sees[None, None, live, :cached],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                logits = qwen.lm_head(hidden[0])
    return [[token for token in answer if token >= 0] for answer in said.tolist()]


def _visible_from(pack: Pack) -> Tensor:
    """(branches, tokens) true where the last token of a branch sees a token of the pack."""
    index = torch.arange(pack.tokens, device=pack.ids.device)
    return (index[None, :] <= pack.ends[:, None]) & (pack.ends[:, None] < pack.visible_until[None, :])


@torch.inference_mode()
def log_probabilities(
    model: Any, pack: Pack, *, attn: str = "sdpa", autocast: torch.dtype | None = None
) -> Tensor:
    """(answers,) fp64, on the CPU: of each answer of a pack, in depth-first order, in nats.

    An answer's log-probability is the sum over its tokens and its end of turn, each from fp32 logits: what
    it has as the answer of a row of its own. Raises NumericFailure where the model gives NaN.
    """
    qwen = base(model)
    found = torch.empty(len(pack.targets), dtype=torch.float32, device=pack.ids.device)
    with torch.autocast(pack.ids.device.type, autocast, enabled=autocast is not None):
        hidden = hidden_states(model, pack, attn)[pack.keep]
        for start in range(0, len(hidden), _ROWS):
            logits = qwen.lm_head(hidden[start : start + _ROWS]).float()
            here = ((pack.pick >= start) & (pack.pick < start + _ROWS)).nonzero()[:, 0]
            row = pack.pick[here] - start
            found[here] = logits[row, pack.targets[here]] - logits.logsumexp(-1)[row]
    _refuse_nan(found)
    each = torch.split(found.double().cpu(), pack.answers.tolist())
    return torch.stack([nats.sum() for nats in each])


def _refuse_nan(numbers: Tensor) -> None:
    """NaN counts as the largest: its token would look like an answer."""
    if torch.isnan(numbers).any():
        raise NumericFailure(
            "the model gives NaN where an answer should be: its weights are damaged, or its numbers too "
            "large for the precision it runs in; train.precision=fp32 tells which"
        )
