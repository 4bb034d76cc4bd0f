"""Fine-tune Qwen2-VL and Qwen3-VL on surgical visual question answering.

    run = surgvqa.load_run("runs/exp1_768")             # what a run left: curves, answers, scores
    predictor = surgvqa.load_predictor("runs/exp1_768")  # its model
    predictor.ask("frame.png", "Is there bleeding?")     # → Answer
    surgvqa.evaluate("runs/exp1_768", "val")             # answer and score a part of its data
    surgvqa.compare("runs/exp1_768", "runs/exp2")        # differences, their intervals and tests

Each name is imported where it is first used, so that `import surgvqa` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgvqa.comparison import compare as compare
    from surgvqa.evaluation import evaluate as evaluate
    from surgvqa.predictor import Answer as Answer
    from surgvqa.predictor import Predictor as Predictor
    from surgvqa.predictor import load_predictor as load_predictor
    from surgvqa.results import load_run as load_run

__version__ = "0.1.0"

_HOMES = {
    "Answer": "predictor", "Predictor": "predictor", "compare": "comparison", "evaluate": "evaluation",
    "load_predictor": "predictor", "load_run": "results",
}  # fmt: skip

__all__ = ["Answer", "Predictor", "__version__", "compare", "evaluate", "load_predictor", "load_run"]


if not TYPE_CHECKING:  # or every name would count as there

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'surgvqa' has no attribute {name!r}")
        found = getattr(importlib.import_module(f"surgvqa.{_HOMES[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
