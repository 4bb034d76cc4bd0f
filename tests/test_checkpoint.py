"""Checkpoints: whole or not there; found by step; nothing that is needed is deleted."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgvqa import checkpoint, memory
from surgvqa.endings import StorageFailure


def saved(root: Path, *steps: int, keep: int = 2, score: float | None = None) -> list[str]:
    for step in steps:
        with checkpoint.writing(root, step, keep=keep) as folder:
            (folder / "weights").write_bytes(os.urandom(5000))
            (folder / checkpoint.STATE).write_text(
                json.dumps({"step": step, "score": score and (score, -1)}), encoding="utf-8"
            )
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir())


@pytest.mark.fault("F28")
def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    assert saved(tmp_path, 1) == ["step-000001"]
    assert checkpoint.best(tmp_path) is None
    assert saved(tmp_path, 2, score=0.5) == ["step-000001", "step-000002"]
    assert saved(tmp_path, 3, score=0.5) == ["step-000002", "step-000003"]
    assert saved(tmp_path, 4, 5, score=0.4) == ["step-000002", "step-000004", "step-000005"]
    assert checkpoint.best(tmp_path) == tmp_path / "step-000002"
    assert checkpoint.score(tmp_path / "step-000002") == (0.5, -1)
    assert saved(tmp_path, 6, score=0.6) == ["step-000005", "step-000006"]


def test_a_save_after_falling_back_replaces_the_future_that_was_given_up(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, score=0.1)
    saved(tmp_path, 30, score=0.9)
    saved(tmp_path, 40, score=0.2)
    for step in (30, 40):
        damage(tmp_path / f"step-0000{step}" / "weights", "truncated")
    assert saved(tmp_path, 25, keep=2, score=0.0) == ["step-000025"]
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000025", [])


@pytest.mark.fault("F28")
def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("step-999999", "best", "step-1", "notes"):
        (tmp_path / name).mkdir()
    assert saved(tmp_path, 1, 2, 3) == [
        "best",
        "notes",
        "step-000002",
        "step-000003",
        "step-1",
        "step-999999",
    ]
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000003", [])


def test_a_foreign_folder_is_not_replaced_either(tmp_path: Path) -> None:
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003" / "notes").write_text("mine", encoding="utf-8")
    saved(tmp_path, 1)
    with pytest.raises(StorageFailure, match=r"step-000003: .* not a checkpoint has its name; move it away"):
        saved(tmp_path, 3)
    assert (tmp_path / "step-000003" / "notes").read_text(encoding="utf-8") == "mine"
    assert saved(tmp_path) == ["step-000001", "step-000003"]


def test_a_manifest_of_nothing_is_no_whole_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-000002" / checkpoint.MANIFEST).write_text("{}", encoding="utf-8")
    newest, rejected = checkpoint.newest(tmp_path)
    assert newest == tmp_path / "step-000001"
    assert rejected == [
        f"{tmp_path / 'step-000002'}: trainer/manifest.json: does not name trainer/state.json"
    ]


@pytest.mark.fault("F23")
def test_the_newest_is_chosen_by_step_not_by_time(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10)
    os.utime(tmp_path / "step-000005", (2e9, 2e9))
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step-000010"
    assert checkpoint.newest(tmp_path / "nothing") == (None, [])


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": flipped}[how])


@pytest.mark.parametrize("name", ["weights", checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "deleted"])
@pytest.mark.fault("F9")
def test_damage_is_found_by_name_and_an_older_one_is_taken(tmp_path: Path, name: str, how: str) -> None:
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step-000002" / name, how)
    newest, rejected = checkpoint.newest(tmp_path)
    assert newest == tmp_path / "step-000001"
    assert len(rejected) == 1
    assert f"step-000002: {name}: " in rejected[0]


@pytest.mark.parametrize("name", ["weights", checkpoint.STATE, checkpoint.MANIFEST, ""])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.fault("F31")
def test_one_that_cannot_be_read_is_named_and_an_older_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """A file by its permissions or a bad sector, and the whole folder."""
    saved(tmp_path, 1, 2)
    closed = tmp_path / "step-000002" / name
    for method in ("open", "iterdir"):
        of_path = getattr(Path, method)

        def refused(path: Path, *given: Any, of_path: Any = of_path, **named: Any) -> Any:
            if path == closed:
                raise OSError(number, os.strerror(number), str(path))
            return of_path(path, *given, **named)

        monkeypatch.setattr(Path, method, refused)
    newest, rejected = checkpoint.newest(tmp_path)
    assert os.strerror(number) in rejected[0]
    assert rejected[0].startswith(f"{tmp_path / 'step-000002'}: {name}")
    assert newest == tmp_path / "step-000001" or not name


@pytest.mark.fault("F8")
def test_a_failing_write_leaves_the_old_ones(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)

    def fail() -> None:
        with checkpoint.writing(tmp_path, 3, keep=2) as folder:
            (folder / "weights").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(
        StorageFailure, match=r"step-000003: .*No space left.* The last good one is .*step-000002"
    ):
        fail()
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000002", [])
    checkpoint.remove_leftovers(tmp_path)
    assert saved(tmp_path) == ["step-000001", "step-000002"]


def test_the_optimizer_comes_back_bit_for_bit(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.AdamW, dict[str, torch.nn.Parameter]]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        names = dict(network.named_parameters())
        return network, torch.optim.AdamW(network.parameters(), lr=0.1), names

    def step(network: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        network(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()

    network, optimizer, names = made()
    step(network, optimizer)
    step(network, optimizer)
    save_file(checkpoint.moments(optimizer, names), tmp_path / "optimizer.safetensors")
    again, its_optimizer, its_names = made()
    again.load_state_dict(network.state_dict())
    checkpoint.load_optimizer(tmp_path / "optimizer.safetensors", its_optimizer, its_names)
    step(network, optimizer)
    step(again, its_optimizer)
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    odd = {"step": torch.zeros(()), "exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}
    for moment, value in (
        ("exp_avg", torch.zeros(3, 4)),
        ("exp_avg_sq", torch.zeros(4, 3).half()),
        ("step", torch.zeros((), dtype=torch.int64)),
        ("another", torch.zeros(4, 3)),
    ):
        moments = {f"0.weight|{key}": each for key, each in {**odd, moment: value}.items()}
        save_file(moments, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=r"0\.weight needs"):
            checkpoint.load_optimizer(
                tmp_path / "odd.safetensors", its_optimizer, {"0.weight": its_names["0.weight"]}
            )
    del its_names
    with pytest.raises(KeyError):
        checkpoint.load_optimizer(
            tmp_path / "optimizer.safetensors", its_optimizer, {"another.name": next(again.parameters())}
        )


def test_copies_share_no_memory_with_the_originals_but_as_the_originals_do(tmp_path: Path) -> None:
    tied = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    originals = {"embed": tied, "lm_head": tied, "other": torch.ones(3, 2).T}
    copied = checkpoint.copies(originals)
    with torch.no_grad():
        for tensor in originals.values():
            tensor.zero_()
    assert copied["embed"] is copied["lm_head"]
    assert copied["embed"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["other"].is_contiguous()
    assert copied["other"].tolist() == [[1, 1, 1], [1, 1, 1]]


def fill(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "weights.safetensors")
    checkpoint.write_json(folder / checkpoint.STATE, {"step": 0})


def test_a_write_goes_on_behind_its_callers_back_and_one_at_a_time(tmp_path: Path) -> None:
    told: list[checkpoint.Written] = []
    may_go_on = threading.Event()

    def fill_later(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert may_go_on.wait(60)
        fill(folder, tensors)

    weight = torch.ones(1000)
    with checkpoint.Writer(tmp_path, 2, told.append) as writer:
        writer.write(1, fill_later, {"weight": weight})
        weight.zero_()
        assert not writer.failed()
        assert (checkpoint.newest(tmp_path), told) == ((None, []), [])
        threading.Timer(0.3, may_go_on.set).start()
        writer.write(2, fill, {"weight": weight})
        assert checkpoint.verify(tmp_path / "step-000001") == []
        assert [each.step for each in told] == [1]
    assert [each.step for each in told] == [1, 2]
    assert told[0].bytes == sum(
        file.stat().st_size for file in (tmp_path / "step-000001").rglob("*") if file.is_file()
    )
    assert min(told[0].waited, told[0].seconds) > 0.2
    for step, value in ((1, 1.0), (2, 0.0)):
        weights = load_file(tmp_path / f"step-00000{step}" / "weights.safetensors")["weight"]
        assert weights.eq(value).all()


def test_a_failed_write_is_raised_once_and_masks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        raise OSError(28, "No space left on device")

    with checkpoint.Writer(tmp_path, 2, lambda written: None) as writer:
        writer.write(1, fail, {})
        until = time.monotonic() + 60
        while not writer.failed():
            assert time.monotonic() < until
        with pytest.raises(StorageFailure, match="No space left"):
            writer.write(2, fill, {})
        assert not writer.failed()
        writer.write(3, fill, {})
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000003", [])

    def end_otherwise() -> None:
        with checkpoint.Writer(tmp_path, 2, print) as writer:
            writer.write(4, fail, {})
            raise ValueError("another reason to end")

    with pytest.raises(ValueError, match="another reason"):
        end_otherwise()
    assert "step-000004: the checkpoint could not be written" in caplog.text


def test_without_memory_for_a_copy_it_is_written_when_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.ones(1000)
    told: list[checkpoint.Written] = []
    for free, copied in ((8000, True), (7999, False)):
        monkeypatch.setattr(memory, "host_free", lambda free=free: free)
        held: list[bool] = []

        def look(folder: Path, tensors: dict[str, torch.Tensor], held: list[bool] = held) -> None:
            held.append(tensors["weight"].data_ptr() != weight.data_ptr())
            fill(folder, tensors)

        with checkpoint.Writer(tmp_path, 2, told.append) as writer:
            writer.write(1, look, {"weight": weight})
            assert copied or len(told) == 2
        assert held == [copied]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "a.json", {"x": 1})
    checkpoint.write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": 2}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]
