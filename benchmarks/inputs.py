"""What every benchmark works on: frames as JPEG files, questions as surgical data sets ask them, and models
of both families large enough that arithmetic, not Python, takes the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.record import RESULTS
from surgvqa import hub, letterbox, model
from surgvqa.datasets import Example, ImageRef
from surgvqa.demo.tiny import write_tiny_model
from surgvqa.recipe import Lora
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

FAMILIES = ("qwen2_vl", "qwen3_vl")
CANVAS = 768
"""Side in pixels; 756 for Qwen2-VL, whose factor is 28."""
SOURCES = ((720, 576), (1280, 1024))
"""Sizes of the frames in pixels, in turn."""
SYSTEM = "You are looking at one image of a gastrointestinal endoscopy. Answer the question about it."
ASKED = (
    ("What type of procedure is the image taken from?", "Colonoscopy"),
    ("How many polyps are in the image?", "1"),
    ("Are there any abnormalities in the image? Check all that are present.", "Polyp; ulcerative colitis"),
    ("Where in the image is the abnormality?", "Center; center-left; lower-left"),
    ("What color is the abnormality? If more than one separate with ;", "Pink; red; white"),
    ("What is the size of the polyp?", "11-20mm"),
    ("Have all polyps been removed?", "No"),
    ("Is there a green/black box artefact?", "Yes"),
    ("Are there any instruments in the image? Check all that are present.", "Polyp snare"),
    ("What type of polyp is present?", "Paris ip"),
    ("Is this finding easy to detect?", "Yes"),
    ("Are there any anatomical landmarks in the image? Check all that are present.", "None"),
    ("Where in the image is the instrument?", "Upper-right; center-right"),
    ("Is there text?", "Yes"),
    ("What is the state of monopolar curved scissors?", "Tissue manipulation"),
    ("Where is bipolar forceps located?", "Left-bottom"),
)
"""Questions and answers as in Kvasir-VQA and, the last two, EndoVis-18-VQA."""

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "small": {
        "text": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        },
        "vision": {"width": 128, "depth": 4, "num_heads": 4},
    },
    "medium": {
        "text": {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
        },
        "vision": {"width": 128, "depth": 4, "num_heads": 4},
    },
    "tiny": {"text": {}, "vision": {}},
}
"""`small` has 6 to 7 million parameters, the vision tower's share about that of Qwen2-VL-7B; `medium` has
about 40 million; `tiny` is the demo's model, for trying the benchmarks."""


@dataclass(frozen=True)
class Setting:
    """One line of a table: everything that is the same for whatever is compared on it. Picklable."""

    folder: Path
    """A model folder that `write_model` wrote."""
    images: tuple[Path, ...]
    per_image: int
    """Questions asked about each image."""
    canvas: int = CANVAS
    device: str = "cpu"
    precision: str = "fp32"
    tune: str = "full"

    @property
    def family(self) -> str:
        return self.folder.name

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    def model_folder(self) -> hub.Folder:
        """The folder under a tiny model's name, so that its weights are random ones from config.json."""
        return replace(hub.find(str(self.folder)), name=f"tiny-{self.family.replace('_', '-')}")

    def questions(self) -> Questions:
        """The questions with nothing read yet: what is drawn is kept from here on, as in a first epoch."""
        chat = ChatTokens(self.model_folder(), system=SYSTEM)
        examples = [
            Example(
                f"{path.stem}-{index}",
                (ImageRef(str(path), path),),
                *_asked((number * self.per_image + index) % len(ASKED)),
            )
            for number, path in enumerate(self.images)
            for index in range(self.per_image)
        ]
        canvases = {
            str(path): letterbox.plan_canvas(
                letterbox.header(path.read_bytes()).size,
                mode="letterbox",
                size=self.canvas,
                max_tokens=0,
                factor=chat.folder.factor,
            )
            for path in self.images
        }
        return Questions(examples, chat, canvases)

    def network(self, *, plain: bool = False) -> Any:
        """The model on its device, ready to train; `plain` is transformers' own, with the same weights."""
        folder = self.model_folder()
        dtype = torch.float32 if self.tune == "full" or self.precision == "fp32" else torch.bfloat16
        network = plain_model(folder, dtype) if plain else model.build(folder, dtype=dtype)
        full = self.tune == "full"
        network = model.adapt(
            network,
            tune=self.tune,
            train_vision=full,
            train_merger=full,
            modules=() if full else Lora().modules,
        )
        return network.to(self.device).train()


def options(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks on these models take."""
    parser = argparse.ArgumentParser(f"benchmarks.{name}", description=description)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models")
    parser.add_argument("--canvas", type=int, default=CANVAS, help="side in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def plain_model(folder: hub.Folder, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """transformers' class as it comes (SDPA), with the random weights that `model.build` gives."""
    from transformers import AutoConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.model_class(folder.family)(AutoConfig.from_pretrained(folder.path))
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network.eval()


def write_model(family: str, size: str, parent: Path) -> Path:
    """A model folder `parent/family` with the demo's tokenizer and a configuration of the given size."""
    folder = write_tiny_model(f"tiny-{family.replace('_', '-')}", parent / family)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    text, vision = SIZES[size]["text"], dict(SIZES[size]["vision"])
    head = text["hidden_size"] // text["num_attention_heads"] if text else 32
    if head != 32:
        raise ValueError(f"heads are {head} wide, but the demo's rotary sections are for 32")
    config.get("text_config", config).update(text)
    if vision:
        width = vision.pop("width")
        hidden = {"hidden_size": text["hidden_size"]}
        if family == "qwen2_vl":
            config["vision_config"].update(vision, **hidden, embed_dim=width, mlp_ratio=4)
        else:
            config["vision_config"].update(
                vision, hidden_size=width, intermediate_size=4 * width, out_hidden_size=hidden["hidden_size"]
            )
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def write_images(count: int, parent: Path, sizes: Sequence[tuple[int, int]] = SOURCES) -> tuple[Path, ...]:
    """JPEG frames: smooth colours with fine noise, about as large on disk as an endoscope's."""
    parent.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(40, 216, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = parent / f"{number:03}.jpg"
        Image.fromarray(noisy).save(file, quality=90)
        files.append(file)
    return tuple(files)


def _asked(number: int) -> tuple[str, tuple[str, ...]]:
    question, answer = ASKED[number]
    return question, (answer,)
