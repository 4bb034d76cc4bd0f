"""What several test files need: tiny models, examples on generated images, the real data where it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FAMILIES = ("tiny-qwen2-vl", "tiny-qwen3-vl")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Generated data and tiny models go into a folder of this test session, also in processes it starts."""
    os.environ["SURGVQA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real files (../shared/data) are not here; a generated twin of this test runs")
    return SHARED


@pytest.fixture(scope="session", params=FAMILIES)
def chat(request: pytest.FixtureRequest) -> Any:
    """Each family's tokens, by way of its tiny model's folder."""
    from surgvqa import hub
    from surgvqa.tokens import ChatTokens

    return ChatTokens(hub.find(request.param), system="Answer in a few words.", instructions={"count": "A number."})


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)
