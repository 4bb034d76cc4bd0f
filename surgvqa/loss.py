"""(model, Pack) → sum of weighted nats: the one division by the step's weight is the loop's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgvqa.model import base, hidden_states
from surgvqa.tree import Pack

CHUNK = 256
"""Targets whose logits are in memory at once: 256 of 152k words are 150 MiB in fp32."""


class TreeLoss(nn.Module):
    """A model with its loss as one module, so that what wraps it (DDP) sees the whole forward pass."""

    def __init__(self, model: Any, *, attn: str, autocast: torch.dtype | None) -> None:
        """`attn` is `sdpa` or `flex`; `autocast` the type to compute in, None for the weights' own."""
        super().__init__()
        self.model = model
        self.attn = attn
        self.autocast = autocast

    def forward(self, pack: Pack) -> Tensor:
        """Σ weight × cross entropy in nats over the pack's supervised tokens, in fp32; a scalar."""
        device = pack.ids.device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            sources = hidden_states(self.model, pack, self.attn)[pack.keep[pack.pick]]
            if len(sources) <= CHUNK:
                return self._nats(sources, pack.targets, pack.weights)
            total = torch.zeros((), device=device)
            chunks = (torch.split(part, CHUNK) for part in (sources, pack.targets, pack.weights))
            for chunk in zip(*chunks, strict=True):
                # Logits are made again in the backward pass rather than kept.
                total = total + checkpoint(self._nats, *chunk, use_reentrant=False, preserve_rng_state=False)
            return total

    def _nats(self, sources: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Σ weight × cross entropy of `targets` (targets,), predicted by `sources` (targets, width)."""
        logits = base(self.model).lm_head(sources).float()
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
