"""(model, Pack) → sum of weighted nats: the one division by the step's weight is the loop's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgvqa import attention
from surgvqa.model import base, image_features
from surgvqa.tree import Pack


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
            logits = base(self.model)(
                input_ids=pack.ids,
                position_ids=pack.positions,
                mm_encoder_outputs={"image": image_features(self.model, pack.patches, pack.grids)},
                logits_to_keep=pack.keep,
                use_cache=False,
                **attention.arguments(pack, self.attn),
            ).logits
        nats = F.cross_entropy(logits[0].float()[pack.pick], pack.targets, reduction="none")
        return (nats * pack.weights).sum()
