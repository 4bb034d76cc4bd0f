"""What fits is found by trying: here on a CPU that claims to be out of memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl

from surgvqa import loss, memory, model, processes, recipe, tree
from surgvqa.loss import TreeLoss
from surgvqa.plan import Plan
from surgvqa.prepare import Prepared, prepare
from surgvqa.recipe import BadInput

RECIPE = """
model: {name: tiny-qwen2-vl, tune: lora}
data: {format: jsonl}
image: {size: 84}
batch: {questions: 12, questions_per_image: 4, tokens_per_micro_batch: 512}
train: {epochs: 1, precision: fp32}
eval: {final: null}
"""

Tokens = int
Layers = int


class Machine:
    """A small run, on a machine whose memory holds what `holds` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = write_jsonl(folder / "data")
        settings = recipe.parse(RECIPE, [f"data.path={data}", f"output={folder / 'run'}"])
        self.accelerator = processes.start()
        self.prepared: Prepared = prepare(settings, self.accelerator)
        self.questions = self.prepared.questions("train")
        self.plan: Plan = self.prepared.plan(self.questions)
        self.network = self.prepared.network().train()
        self.tried: list[tuple[Tokens, Layers]] = []
        self.holds: Callable[[Tokens, Layers], bool] = lambda tokens, layers: True
        forward = TreeLoss.forward

        def limited(module: TreeLoss, pack: tree.Pack) -> torch.Tensor:
            layers = sum(layer.gradient_checkpointing for layer in model.decoder_layers(module.model))
            assert all(p.grad is not None for p in module.parameters() if p.requires_grad), (
                "as in a later step"
            )
            self.tried.append((pack.tokens, layers))
            nats = forward(module, pack)
            if not self.holds(pack.tokens, layers):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return nats

        monkeypatch.setattr(loss.TreeLoss, "forward", limited)

    @property
    def depth(self) -> int:
        return len(model.decoder_layers(self.network))

    def fit(self, tokens: int | str, layers: int | str) -> memory.Fit:
        return memory.fit(
            TreeLoss(self.network, attn="sdpa", autocast=None),
            self.questions,
            self.plan,
            range(self.plan.steps_per_epoch),
            tokens=tokens,
            layers=layers,
            accelerator=self.accelerator,
        )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return Machine(tmp_path, monkeypatch)


def test_what_fits_is_left_as_it_is(machine: Machine) -> None:
    assert machine.fit(512, 0) == memory.Fit(512, 0, 0)
    fullest = max(
        sum(map(machine.plan.tokens, micro_batch))
        for step in range(machine.plan.steps_per_epoch)
        for micro_batch in machine.plan.share(machine.plan.step(step), 1)[0]
    )
    assert machine.tried == [(fullest, 0)]
    assert all(parameter.grad is None for parameter in machine.network.parameters())


@pytest.mark.fault("F14")
def test_a_limit_that_does_not_fit_is_halved(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.holds = lambda tokens, layers: tokens <= 200
    assert machine.fit(512, 0) == memory.Fit(128, 0, 0)
    assert "512 tokens do not fit into memory; going on with 128" in caplog.text


def test_auto_finds_the_largest_that_fits(machine: Machine) -> None:
    share = max(
        sum(map(machine.plan.tokens, machine.plan.step(step))) for step in range(machine.plan.steps_per_epoch)
    )
    assert machine.fit("auto", 0) == memory.Fit(share, 0, 0), "a whole step at once"
    machine.holds = lambda tokens, layers: tokens <= 300
    found = machine.fit("auto", 0).tokens_per_micro_batch
    halved = share
    while halved > 300:
        halved //= 2
    assert halved < found, "closer than by halving"
    tokens = [tokens for tokens, _ in machine.tried if tokens <= 300]
    assert max(tokens) > halved


@pytest.mark.fault("F14")
def test_as_few_layers_as_must_be_are_recomputed(machine: Machine) -> None:
    assert machine.depth == 3
    assert machine.fit(512, "auto").checkpoint_layers == 0
    assert machine.fit(512, "all").checkpoint_layers == machine.depth
    machine.holds = lambda tokens, layers: layers >= 2
    assert machine.fit(512, "auto").checkpoint_layers == 2
    flags = [layer.gradient_checkpointing for layer in model.decoder_layers(machine.network)]
    assert flags == [True, True, False], "the model is left so"
    machine.holds = lambda tokens, layers: layers >= 1 and tokens <= 300
    assert machine.fit(512, "auto") == memory.Fit(256, 1, 0)


def test_more_layers_than_there_are_mean_all(machine: Machine) -> None:
    assert machine.fit(512, 100).checkpoint_layers == machine.depth


def test_a_run_that_is_only_evaluated_tries_nothing(machine: Machine) -> None:
    machine.plan, steps = machine.plan, range(5, 5)
    loss_of = TreeLoss(machine.network, attn="sdpa", autocast=None)
    found = memory.fit(
        loss_of,
        machine.questions,
        machine.plan,
        steps,
        tokens=512,
        layers="auto",
        accelerator=machine.accelerator,
    )
    assert found == memory.Fit(512, 0, 0)
    assert not machine.tried


def test_where_the_tower_trains_the_most_images_are_tried_too(machine: Machine) -> None:
    """Not always the most tokens: many images with few questions each."""
    for parameter in model.base(machine.network).model.visual.parameters():
        parameter.requires_grad_(True)
    machine.fit(512, 0)
    assert len(machine.tried) == 2


@pytest.mark.fault("F14")
def test_where_nothing_fits_the_longest_question_is_named(machine: Machine) -> None:
    machine.holds = lambda tokens, layers: False
    with pytest.raises(
        BadInput, match=r"questions.jsonl:\d+: out of memory: question '\d+-\d+' with its image"
    ):
        machine.fit("auto", "auto")
    longest = int(machine.plan.alone().max())
    assert longest <= min(tokens for tokens, _ in machine.tried) <= 2 * longest


def test_other_failures_are_not_taken_for_a_lack_of_memory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: TreeLoss, pack: tree.Pack) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loss.TreeLoss, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        machine.fit(512, 0)


def test_free_host_memory_is_that_of_the_machine_or_of_the_tightest_group(tmp_path: Path) -> None:
    assert memory.host_free(tmp_path) == sys.maxsize
    job = tmp_path / "sys/fs/cgroup/slurm/job_1"
    for folder in (tmp_path / "proc/self", job / "step"):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable:     40 kB\n")
    assert memory.host_free(tmp_path) == 40 * 1024
    (tmp_path / "proc/self/cgroup").write_text("1:name=other:/x\n0::/slurm/job_1/step\n")
    (job / "step/memory.max").write_text("max\n")
    (job / "memory.max").write_text("30000\n")
    (job / "memory.current").write_text("29000\n")
    (job / "memory.stat").write_text("anon 20000\nactive_file 5000\ninactive_file 4000\n")
    assert memory.host_free(tmp_path) == 30000 - 29000 + 9000
    assert 2**20 < memory.host_free() < 2**50
