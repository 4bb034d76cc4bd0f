"""One GPU at full size: `bash benchmarks/gpu.sh` checks gradients and answers, then measures speed, memory.

    correctness   gradients, masks and answers of four-layer models as wide as the real ones
    Qwen2-VL-7B   756 canvas, 9 questions per image: trees, rows, a plain loop, TRL; a recipe's options
    Qwen3-VL-8B   8 questions per image: 2,916 tokens per image, and a 768 canvas
    answering     trees against transformers' `generate`

Weights are random and are made on the device, so only configuration, tokenizer and image processor are read.
Cases run in order of importance; one that no longer fits into the time budget is skipped, and said so.
`--dry-run` runs the same code on a CPU with the demo's models: its numbers say nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import decode, peer
from benchmarks.inputs import Setting, write_images, write_model
from benchmarks.record import RESULTS, spread, write
from benchmarks.train import LEARNING_RATE, plan_of, train_plain
from benchmarks.turns import stopwatch
from surgvqa import attention, flops, hub, memory, model, processes
from surgvqa.loss import TreeLoss
from surgvqa.plan import Plan
from surgvqa.recipe import BadInput, Lora
from surgvqa.tree import Pack, Questions, packs

QWEN2, QWEN3 = "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"
TOKENS = 8192
"""Tokens per micro-batch where nothing else is said: the recipe's default."""
SPREAD = 1.5
"""How many times as far from fp32 as the bf16 gradients of rows those of trees may be."""
EQUAL = 1e-4
"""Largest relative difference between two ways to compute the same in fp32."""

LARGE = "trees, large images, all layers recomputed"

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much of everything there is."""

    small: int
    """Side of the canvas, in pixels, of both models' small images …"""
    large: int
    """… and of Qwen3-VL's large ones: 54 × 54 tokens in full."""
    per_image: tuple[int, int]
    """Questions per image, of Qwen2-VL and Qwen3-VL."""
    images: int
    """Images per optimizer step of trees."""
    few: int
    """Images per optimizer step where each question is a row, and where images are large."""
    warm_up: int
    steps: int
    """Optimizer steps that are timed, after those of the warm-up."""
    tokens: tuple[int, ...]
    """Tokens per micro-batch to try beside the default."""
    checked: int
    """Side of the canvas, in pixels, of the correctness checks."""
    compiled: bool
    padded_rows: tuple[int, ...]
    """Rows per micro-batch of the plain loop: the first without, the others with recomputed layers."""


FULL = Scale(768, 1728, (9, 8), 16, 4, 2, 5, (4096, 16384), 288, True, (8, 8, 4))
DRY = Scale(64, 96, (3, 2), 2, 1, 1, 1, (256,), 64, False, (2,))


@dataclass(frozen=True)
class RandomWeights(Setting):
    """A Setting whose model is as large as its config.json says, with random weights made on the device."""

    title: str = ""

    @property
    def family(self) -> str:
        return self.model_folder().family

    def model_folder(self) -> hub.Folder:
        return hub.find(str(self.folder))

    def network(self, *, plain: bool = False) -> Any:
        """LoRA on the language model, rest frozen; the same weights each time."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        network = random_model(self.folder, torch.device(self.device), dtype)
        return model.adapt(
            network if plain else model.equip(network),
            tune="lora",
            train_vision=False,
            train_merger=False,
            modules=Lora().modules,
        ).train()


def random_model(folder: Path, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """transformers' model of a folder with its first, random weights in `dtype`, made on `device`.

    What transformers computes in fp32 (rotary frequencies) is as it would be after loading.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[0] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        made = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    return made.eval()


def shallow(folder: Path, target: Path, layers: int = 4) -> Path:
    """A copy of a model folder whose towers have `layers` layers, each as wide as before."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", ".*"))
    file = target / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    text, vision = config.get("text_config", config), config["vision_config"]
    text["num_hidden_layers"] = min(layers, text["num_hidden_layers"])
    vision["depth"] = min(layers, vision["depth"])
    for config_of in (config, text):
        if "layer_types" in config_of:
            config_of["layer_types"] = config_of["layer_types"][:layers]
    if taps := vision.get("deepstack_visual_indexes"):
        vision["deepstack_visual_indexes"] = list(range(min(len(taps), vision["depth"])))
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


@dataclass
class Bench:
    """What all cases share. One network at a time is on the device."""

    qwen2: RandomWeights
    qwen3: RandomWeights
    folder: Path
    """A place for files, gone afterwards."""
    scale: Scale
    device: torch.device
    ends: float
    """Of the time budget, by time.monotonic()."""
    compute: processes.Compute = field(init=False)
    held: tuple[Any, Any] = field(init=False, default=(None, None))
    """(what it was made of, network)."""

    def __post_init__(self) -> None:
        self.accelerator = processes.start()
        self.compute = processes.compute("bf16", "auto", self.device)
        self.workers = processes.data_workers(None, self.device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def network(self, setting: RandomWeights, *, plain: bool = False) -> Any:
        """The setting's network, in training mode; the one held if it is the same."""
        key = (setting.folder, setting.precision, plain)
        if self.held[0] != key:
            self.release()
            self.held = (key, setting.network(plain=plain))
        return self.held[1].train()

    def release(self) -> None:
        """Let go of the network, and of memory that nothing uses."""
        self.held = (None, None)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> Row:
        """GiB of the device that tensors took at most, and that PyTorch reserved for them."""
        if not self.cuda:
            return {"peak_gib": None, "reserved_gib": None}
        return {
            "peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved(self.device) / 2**30,
        }

    def speeds(self, questions_per_s: Sequence[float], flops_per_question: float) -> Row:
        """Questions per second; useful TFLOP/s and, where the device's peak is known, their share of it."""
        useful = statistics.median(questions_per_s) * flops_per_question
        most = flops.peak(torch.cuda.get_device_name(self.device), "bf16") if self.cuda else None
        return {
            "questions_per_s": spread(questions_per_s),
            "tflop_per_question": flops_per_question / 1e12,
            "tflops": useful / 1e12,
            "mfu": useful / most if most else None,
        }


# Training.


def plan(questions: Questions, per_image: int, images: int, tokens: int, *, shared: bool = True) -> Plan:
    return Plan(
        image=questions.image,
        branch_tokens=questions.branch_tokens,
        root_tokens=questions.root_tokens,
        questions=per_image * images,
        questions_per_image=per_image,
        tokens_per_micro_batch=max(tokens, int(questions.root_tokens.max() + questions.branch_tokens.max())),
        seed=0,
        trees=shared,
    )


def useful(network: Any, questions: Questions, per_image: int) -> float:
    """FLOPs that a question takes in a tree of `per_image`: an image once, each of its questions once."""
    whole = plan(questions, per_image, len(questions) // per_image, 2**62)
    return flops.StepCost(network, questions).step(whole.step(0)) / len(questions)


def trees(
    bench: Bench,
    setting: RandomWeights,
    images: int,
    *,
    tokens: int = TOKENS,
    layers: int | str = "auto",
    attn: str | None = None,
    compiled: bool = False,
    shared: bool = True,
) -> Row:
    """Train as surgvqa.train does: fit into memory, then steps of `images` images and all their questions."""
    questions, network = setting.questions(), bench.network(setting)
    per_image = setting.per_image
    if compiled:
        model.compile_layers(network)
    loss_of = TreeLoss(network, attn=attn or bench.compute.attn, autocast=bench.compute.autocast)
    total = bench.scale.warm_up + bench.scale.steps
    order = plan(questions, per_image, images, tokens, shared=shared)
    if layers == "half":
        layers = len(model.decoder_layers(network)) // 2
    fit = memory.fit(
        loss_of,
        questions,
        order,
        range(total),
        tokens=order.tokens_per_micro_batch,
        layers=layers,
        accelerator=bench.accelerator,
    )
    order = replace(order, tokens_per_micro_batch=fit.tokens_per_micro_batch)
    bench.forget_peak()
    seconds, waited = step_seconds(bench, loss_of, questions, order, total)
    if compiled:
        bench.release()  # the next case's layers are not
    return {
        **bench.speeds(
            [order.questions / each for each in seconds], useful(loss_of.model, questions, per_image)
        ),
        **bench.peaks(),
        "waiting_share": waited / sum(seconds),
        "questions_per_step": order.questions,
        "tokens_per_micro_batch": fit.tokens_per_micro_batch,
        "checkpoint_layers": fit.checkpoint_layers,
        "attn": loss_of.attn,
        "compile": compiled,
    }


def step_seconds(
    bench: Bench, loss_of: TreeLoss, questions: Questions, order: Plan, total: int
) -> tuple[list[float], float]:
    """Seconds of each timed step, data included, and for how many of them the host waited for data, while the
    device may have been busy.

    Steps end early, with at least one timed, where the time budget does.
    """
    trained = [parameter for parameter in loss_of.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=bench.cuda)
    ready = packs(questions, _jobs(order, total), workers=bench.workers, cuda=bench.cuda)
    seconds: list[float] = []
    waited = 0.0
    for step in range(total):
        asked = [question for tree in order.step(step) for question in tree]
        weight = float(questions.total_weights[asked].sum())
        waiting, last = 0.0, False
        with stopwatch(bench.device) as took:
            while not last:
                began = time.perf_counter()
                last, pack = next(ready)
                waiting += time.perf_counter() - began
                (loss_of(pack.to(bench.device)) / weight).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step >= bench.scale.warm_up:
            seconds += took
            waited += waiting
            if time.monotonic() > bench.ends:
                break
    return seconds, waited


def _jobs(order: Plan, total: int) -> Iterator[tuple[bool, Sequence[Sequence[int]], int]]:
    """(whether the step ends with it, trees, epoch) of each micro-batch."""
    for step in range(total):
        (mine,) = order.share(order.step(step), 1)
        for index, micro_batch in enumerate(mine):
            yield index == len(mine) - 1, micro_batch, order.epoch(step)


def plain(bench: Bench, setting: RandomWeights) -> Row:
    """transformers' own model, loss and padded rows, with recomputed layers if it does not fit without."""
    setting = replace(setting, images=setting.images[: bench.scale.few])
    cost = useful(bench.network(setting), setting.questions(), setting.per_image)
    for attempt, rows in enumerate(bench.scale.padded_rows):
        network = bench.network(setting, plain=True)
        layers = len(model.decoder_layers(network)) if attempt else 0
        model.recompute(network, layers)
        try:
            return _plain(bench, setting, network, rows, cost) | {"checkpoint_layers": layers}
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or attempt == len(bench.scale.padded_rows) - 1:
                raise
        del network
        bench.release()
    raise AssertionError("there is at least one attempt")


def _plain(bench: Bench, setting: RandomWeights, network: Any, rows: int, cost: float) -> Row:
    questions = setting.questions()
    order = plan_of(questions, setting.per_image, step=len(questions))
    bench.forget_peak()
    speeds: list[float] = []
    for step in range(1 + bench.scale.steps):
        measured = train_plain(
            network, questions, order, device=bench.device, autocast=bench.compute.autocast, rows=rows
        )
        speeds += [measured.speed] if step else []
        if speeds and time.monotonic() > bench.ends:
            break
    return {
        **bench.speeds(speeds, cost),
        **bench.peaks(),
        "questions_per_step": len(questions),
        "rows_per_micro_batch": rows,
    }


def trl(bench: Bench, setting: RandomWeights) -> Row:
    """TRL's SFTTrainer, one epoch of the plain loop's questions; its first step is timed too."""
    setting = replace(setting, images=setting.images[: bench.scale.few])
    cost = useful(bench.network(setting), setting.questions(), setting.per_image)
    bench.release()
    bench.forget_peak()
    measured = peer.trl(setting)
    return {**bench.speeds([measured.speed], cost), **bench.peaks()}


# Answering.


def answering(bench: Bench, setting: RandomWeights, *, generate: bool) -> Row:
    """Questions answered per second, with as many rows in a batch as a pack has branches."""
    images = 2 * bench.scale.few
    setting = replace(setting, images=setting.images[:images])
    questions, at_once = setting.questions(), max(1, images // 2)
    network = bench.network(setting, plain=generate).eval()
    bench.forget_peak()
    speeds: list[float] = []
    for round_ in range(1 + bench.scale.steps):
        if generate:
            measured = decode.decode_rows(
                network,
                questions,
                device=bench.device,
                autocast=bench.compute.autocast,
                rows=at_once * setting.per_image,
            )
        else:
            measured = decode.decode_trees(
                network,
                questions,
                device=bench.device,
                attn=bench.compute.attn,
                autocast=bench.compute.autocast,
                trees=at_once,
                workers=0,
            )
        speeds += [measured.speed] if round_ else []
        if speeds and time.monotonic() > bench.ends:
            break
    return {"questions_per_s": spread(speeds), **bench.peaks(), "new_tokens": decode.NEW_TOKENS}


# Correctness.


def correctness(bench: Bench, setting: RandomWeights) -> Row:
    """Compare what trees compute with rows, dense masks and `generate`, on a shallow model."""
    folder = shallow(setting.folder, bench.folder / f"shallow-{setting.family}")
    setting = replace(
        setting, folder=folder, images=setting.images[:2], canvas=bench.scale.checked, per_image=5
    )
    bench.release()
    checks = list(_gradients(bench, setting))
    bench.release()  # that network's weights are no longer the setting's
    with no_tf32():
        checks.append(_answers(bench, replace(setting, precision="fp32")))
    bench.release()
    return {"checks": checks}


@contextmanager
def no_tf32() -> Iterator[None]:
    """Matrix products of fp32 in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check(name: str, value: float, limit: float, *, at_least: bool = False) -> Row:
    holds = value >= limit if at_least else value <= limit
    return {"check": name, "value": value, "limit": limit, "holds": holds}


def _gradients(bench: Bench, setting: RandomWeights) -> Iterator[Row]:
    questions, network = setting.questions(), bench.network(setting)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.trainable(network):
        if "lora_B" in name:  # zeros at first, and so would be half of the gradients
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values)
    shared = plan(questions, setting.per_image, len(setting.images), 2**62).step(0)
    tree_pack, row_pack = (
        questions.pack(some, cuda=bench.cuda).to(bench.device)
        for some in (shared, [[question] for tree in shared for question in tree])
    )
    attn = bench.compute.attn
    in_bf16 = [gradients(network, pack, attn, torch.bfloat16) for pack in (tree_pack, row_pack)]
    network.float()  # the same weights from here on
    with no_tf32():
        exact, of_rows = (gradients(network, pack, "sdpa", None) for pack in (tree_pack, row_pack))
        of_trees, of_bf16_rows = (relative(found, exact) for found in in_bf16)
        yield check("gradients in fp32, trees against rows", relative(of_rows, exact), EQUAL)
        both = {"error_of_trees": of_trees, "error_of_rows": of_bf16_rows}
        name = "gradients in bf16 against fp32, error of trees / error of rows"
        yield check(name, of_trees / of_bf16_rows, SPREAD) | both
        if bench.cuda:
            flexible = gradients(network, tree_pack, "flex", None)
            yield check("gradients in fp32, FlexAttention against SDPA", relative(flexible, exact), EQUAL)
        text = network.get_base_model().config.text_config
        for pack in (tree_pack, row_pack):
            name = f"FlexAttention against the dense mask, {pack.tokens} tokens"
            yield check(name, attention_error(pack, text, backward=bench.cuda), EQUAL)


def gradients(network: Any, pack: Pack, attn: str, autocast: torch.dtype | None) -> Tensor:
    """Of all that trains, one after the other, on the host in fp64."""
    TreeLoss(network, attn=attn, autocast=autocast)(pack).backward()
    found = [p.grad for _, p in model.trainable(network) if p.grad is not None]
    joined = torch.cat([grad.flatten() for grad in found]).double().cpu()
    network.zero_grad(set_to_none=True)
    return joined


def relative(found: Tensor, exact: Tensor) -> float:
    """Length of the difference, as a share of the length of what is exact."""
    return float((found - exact).norm() / exact.norm())


def attention_error(pack: Pack, text: Any, backward: bool) -> float:
    """The largest relative error of FlexAttention's output and, with `backward`, of its gradients, against
    the dense mask, for random queries, keys and values in fp32 with the heads of a text configuration."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn((1, heads, pack.tokens, width), generator=generator).to(pack.ids.device)
        for heads in (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    ]

    def through(**mask: Any) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_(backward) for tensor in given]
        out = attention.tree_attention(torch.nn.Identity(), *inputs, scaling=width**-0.5, **mask)[0]
        if not backward:
            return [out]
        return [out, *torch.autograd.grad((out * out).sum(), inputs)]

    flexible = through(**attention.arguments(pack, "flex"))
    dense = through(attention_mask=pack.mask()[None, None])
    return max(relative(found, exact) for found, exact in zip(flexible, dense, strict=True))


def _answers(bench: Bench, setting: RandomWeights) -> Row:
    questions = setting.questions()
    network = bench.network(setting).eval()
    ours = decode.decode_trees(network, questions, device=bench.device, attn=bench.compute.attn, trees=2)
    del network
    network = bench.network(setting, plain=True).eval()
    theirs = decode.decode_rows(network, questions, device=bench.device)
    same = sum(a == b for a, b in zip(ours.answers, theirs.answers, strict=True)) / len(questions)
    return check("answers in fp32 that are those of generate", same, 1.0, at_least=True)


# The run.


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    """Of the model."""
    needs: float
    """Seconds that it may take on a GPU, kernels' compilation included."""
    run: Callable[[], Row]
    unless: str | None = None
    """Why it cannot run here."""


def cases(bench: Bench) -> list[Case]:
    """In order of importance."""
    scale, seven, eight = bench.scale, bench.qwen2, bench.qwen3

    def case(name: str, needs: float, run: Callable[..., Row], unless: str | None = None, **how: Any) -> Case:
        return Case(name, seven.title, needs, partial(run, bench, seven, **how), unless)

    def tried(name: str, needs: float = 30, unless: str | None = None, **how: Any) -> Case:
        return case(f"trees, {name}", needs, trees, unless, images=scale.images, **how)

    def wide(name: str, canvas: int, **how: Any) -> Case:
        return Case(name, eight.title, 50, partial(trees, bench, replace(eight, canvas=canvas), **how))

    no_flex = None if bench.cuda else "FlexAttention has no backward pass on a CPU"
    no_compile = None if scale.compiled else "nothing is compiled in a dry run"
    no_trl = peer.missing() if bench.cuda else "not in a dry run"
    return [
        Case("correctness", seven.title, 90, partial(correctness, bench, seven)),
        Case("correctness", eight.title, 60, partial(correctness, bench, eight)),
        case("trees", 50, trees, images=scale.images),
        wide(LARGE, scale.large, images=scale.few, tokens=4096, layers="all"),
        case("rows", 40, trees, images=scale.few, shared=False),
        case("plain loop", 50, plain),
        tried("no layer recomputed", layers=0),
        tried("half the layers recomputed", layers="half"),
        tried("all layers recomputed", layers="all"),
        *(tried(f"{tokens:,} tokens per micro-batch", tokens=tokens) for tokens in scale.tokens),
        tried("SDPA", unless=no_flex, attn="sdpa"),
        tried("compiled layers", 100, no_compile, compiled=True),
        case("answering, trees", 30, answering, generate=False),
        case("answering, generate", 40, answering, generate=True),
        wide("trees, 768 canvas", scale.small, images=scale.images),
        case("TRL", 90, trl, no_trl),
    ]


def attempt(bench: Bench, case: Case) -> Row:
    """Run a case if there is time; running out of memory, or any other failure, ends that case alone."""
    row: Row = {"case": case.name, "model": case.title}
    left = bench.ends - time.monotonic()
    if case.unless:
        return row | {"status": "skipped", "why": case.unless}
    if left < (case.needs if bench.cuda else 0):
        why = f"{max(left, 0):.0f} s left of the budget, and it may take {case.needs:.0f} s"
        return row | {"status": "skipped", "why": why}
    began = time.monotonic()
    try:
        row |= {"status": "measured", **case.run()}
    except Exception as error:
        status = "out of memory" if out_of_memory(error) else "failed"
        row |= {"status": status, "why": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    if row["status"] != "measured":
        bench.release()
    return row | {"seconds": time.monotonic() - began}


def out_of_memory(error: Exception) -> bool:
    if isinstance(error, BadInput):
        return "out of memory" in str(error)
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def targets(rows: Sequence[Row], sevens: str, eights: str) -> list[Row]:
    """What the measurements are held against; `met` is None where there is no measurement."""
    wanted = (
        (sevens, "trees", "questions_per_s", 100.0, True),
        (sevens, "trees", "mfu", 0.5, True),
        (eights, LARGE, "peak_gib", 24.0, False),
    )
    found: list[Row] = []
    for title, case, key, target, at_least in wanted:
        row = next((r for r in rows if (r["model"], r["case"]) == (title, case)), {})
        value = row.get(key)
        value = value["median"] if isinstance(value, dict) else value
        met = None if value is None else (value >= target if at_least else value <= target)
        found.append(
            {
                "target": f"{title}, {case}: {key} {'>=' if at_least else '<='} {target:g}",
                "value": value,
                "met": met,
                "off_by": None if value is None or met else abs(value - target) / target,
            }
        )
    return found


def line(row: Row) -> tuple[str, ...]:
    """A row of the table: case, model, questions/s, MFU, GiB, and what else there is to say."""
    if row["status"] != "measured":
        return row["case"], row["model"], "", "", "", f"{row['status']}: {row['why']}"
    if "checks" in row:
        held = sum(each["holds"] for each in row["checks"])
        return row["case"], row["model"], "", "", "", f"{held} of {len(row['checks'])} checks hold"
    speed, mfu, peak = row["questions_per_s"], row.get("mfu"), row["peak_gib"]
    said = {
        "tokens_per_micro_batch": "{:,} tokens",
        "rows_per_micro_batch": "{} rows",
        "checkpoint_layers": "{} layers recomputed",
        "waiting_share": "{:.0%} waiting for data",
    }
    return (
        row["case"],
        row["model"],
        f"{speed['median']:.1f} ({speed['min']:.1f}-{speed['max']:.1f})",
        "" if mfu is None else f"{mfu:.1%}",
        "" if peak is None else f"{peak:.1f}",
        ", ".join(text.format(row[key]) for key, text in said.items() if key in row),
    )


def show(console: Console, rows: Sequence[Row], held: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("case", "model", "questions/s", "MFU", "peak GiB", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*line(row))
    console.print(table)
    for row in rows:
        for each in row.get("checks", ()):
            verdict = "holds" if each["holds"] else "FAILS"
            console.print(
                f"{verdict}  {row['model']}: {each['check']}: {each['value']:.2e} (limit {each['limit']:g})"
            )
    for each in held:
        verdict = {True: "met", False: "missed", None: "not measured"}[each["met"]]
        value = "" if each["value"] is None else f": {each['value']:.3g}"
        off = f", off by {each['off_by']:.0%}" if each["off_by"] is not None else ""
        console.print(f"{verdict:12}  {each['target']}{value}{off}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a check fails or a case broke, 2 nothing can be measured here."""
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--qwen2", default=QWEN2, help="hub id or folder; no weights are needed")
    parser.add_argument("--qwen3", default=QWEN3, help="the same for Qwen3-VL")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all cases together")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with the demo's models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    ends = time.monotonic() + given.budget
    if not given.dry_run and not torch.cuda.is_available():
        print("torch finds no CUDA GPU; to try the script without one: --dry-run", file=sys.stderr)
        return 2
    scale, device = (DRY, "cpu") if given.dry_run else (FULL, "cuda")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as parent:
        try:
            if given.dry_run:
                folders = [write_model(family, "tiny", Path(parent)) for family in ("qwen2_vl", "qwen3_vl")]
            else:
                folders = [hub.find(name).path for name in (given.qwen2, given.qwen3)]
        except BadInput as error:
            print(error, file=sys.stderr)
            return 2
        images = write_images(2 * scale.images, Path(parent) / "images")
        titles = ("tiny Qwen2-VL", "tiny Qwen3-VL") if given.dry_run else ("Qwen2-VL-7B", "Qwen3-VL-8B")
        settings = [
            RandomWeights(folder, images, per_image, scale.small, device, "bf16", "lora", title)
            for folder, per_image, title in zip(folders, scale.per_image, titles, strict=True)
        ]
        seven, eight = settings
        bench = Bench(seven, eight, Path(parent), scale, torch.device(device), ends)
        about = {"budget_s": given.budget, "dry_run": given.dry_run, "models": [str(f) for f in folders]}
        for case in cases(bench):
            console.print(f"{max(0, ends - time.monotonic()):4.0f} s left  {case.title}: {case.name}")
            rows.append(attempt(bench, case))
            console.print(f"{'':11}{' '.join(line(rows[-1])[2:])}")
            held = [] if given.dry_run else targets(rows, *titles)
            # After each case: what is measured stays, whatever ends the job.
            file = write("gpu", about | {"targets": held}, rows, given.out)
        bench.release()
    show(console, rows, held)
    console.print(f"written: {file}")
    checks = [each["holds"] for row in rows for each in row.get("checks", ())]
    return int(not all(checks) or any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
