"""Tests of checkpoints: all bits are restored, an incomplete checkpoint never counts, changed runs are refused."""

import errno
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import config
from lorakit.core.errors import LorakitError
from lorakit.training import checkpoint

ADAPTER = {"b.up": torch.arange(6.0).reshape(2, 3).T, "a.down": torch.randn(3, 2)}
EMPTY = {"state": {}, "param_groups": []}


def trained(build) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Return two parameters and their optimizer from `build`, after three steps."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(7))]
    optimizer = build(parameters)
    for _ in range(3):
        step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters:
        parameter.grad = parameter.detach().sin()
    optimizer.step()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def eight_bit(parameters):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.AdamW8bit(parameters, lr=0.1, min_8bit_size=128)


def prodigy(parameters):
    return pytest.importorskip("prodigyopt").Prodigy(parameters, lr=1.0)


def adafactor(parameters):
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=0.1, relative_step=False, scale_parameter=False)


@pytest.mark.parametrize("build", [adamw, eight_bit, prodigy, adafactor])
def test_a_restored_optimizer_continues_bit_by_bit(tmp_path, build):
    parameters, optimizer = trained(build)
    adapter = {str(n): p.detach() for n, p in enumerate(parameters)}
    path = checkpoint.save(tmp_path, 3, adapter, optimizer.state_dict(), {"retry": 0})
    state = checkpoint.load(path)

    others = [torch.nn.Parameter(tensor) for tensor in state.adapter.values()]
    other = build(others)
    other.load_state_dict(state.optimizer)
    for _ in range(3):
        step(parameters, optimizer)
        step(others, other)
    for one, two in zip(parameters, others, strict=True):
        assert torch.equal(one, two)


def test_eight_bit_state_stays_eight_bit(tmp_path):
    _, optimizer = trained(eight_bit)
    state = checkpoint.load(checkpoint.save(tmp_path, 1, ADAPTER, optimizer.state_dict(), {}))
    assert state.optimizer["state"][0]["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8


def test_every_value_is_restored(tmp_path):
    odd = {
        "state": {
            0: {"step": torch.tensor(3.0), "n": 2, "none": None},
            7: {"u": torch.tensor([1, 255], dtype=torch.uint8)},
        },
        "param_groups": [
            {"betas": (0.9, 1 / 3), "lr": 1e-4, "limit": float("inf"), "fused": None, "on": True, "p": [0, 7]}
        ],
    }
    extra = {"history": [{"step": 1, "mse": 0.1}]}
    restored = checkpoint.load(checkpoint.save(tmp_path, 12, ADAPTER, odd, extra))
    assert restored.step == 12 and restored.extra == extra
    assert list(restored.adapter) == list(ADAPTER)
    assert all(torch.equal(restored.adapter[name], ADAPTER[name]) for name in ADAPTER)
    assert restored.optimizer["param_groups"] == odd["param_groups"]
    assert isinstance(restored.optimizer["param_groups"][0]["betas"], tuple)
    state = restored.optimizer["state"]
    assert list(state) == [0, 7] and state[0]["n"] == 2 and state[0]["none"] is None
    assert state[0]["step"].shape == () and state[7]["u"].tolist() == [1, 255] and state[7]["u"].dtype == torch.uint8


def test_nothing_is_pickled(tmp_path):
    path = checkpoint.save(tmp_path, 1, ADAPTER, EMPTY, {})
    assert sorted(file.name for file in path.iterdir()) == sorted([*checkpoint.FILES, checkpoint.MARKER])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_never_saved(tmp_path, bad):
    checkpoint.save(tmp_path, 1, ADAPTER, EMPTY, {})
    with pytest.raises(LorakitError, match=r"step 2: b.up is not finite, so no checkpoint was written"):
        checkpoint.save(tmp_path, 2, ADAPTER | {"b.up": torch.tensor([1.0, bad])}, EMPTY, {})
    optimizer = {"state": {0: {"exp_avg": torch.tensor(bad)}}, "param_groups": []}
    with pytest.raises(LorakitError, match=r"step 2: optimizer.state.0.exp_avg is not finite"):
        checkpoint.save(tmp_path, 2, ADAPTER, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_latest_is_the_highest_complete_step(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for number in (90, 100, 1000000):
        checkpoint.save(tmp_path, number, ADAPTER, EMPTY, {})
    (tmp_path / "step-1000000" / checkpoint.MARKER).unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000100"
    with pytest.raises(LorakitError, match="step-1000000 is not a complete checkpoint"):
        checkpoint.load(tmp_path / "step-1000000")


def test_rotation_keeps_the_newest_complete_checkpoints(tmp_path):
    for number in (1, 2, 3, 4):
        checkpoint.save(tmp_path, number, ADAPTER, EMPTY, {})
    (tmp_path / "step-000004" / checkpoint.MARKER).unlink()
    (tmp_path / ".building-step-000009-1").mkdir()
    checkpoint.rotate(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    checkpoint.rotate(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_step_can_be_saved_again(tmp_path):
    checkpoint.save(tmp_path, 5, ADAPTER, EMPTY, {"which": 1})
    path = checkpoint.save(tmp_path, 5, ADAPTER, EMPTY, {"which": 2})
    assert checkpoint.load(path).extra == {"which": 2} and len(list(tmp_path.iterdir())) == 1


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    path = checkpoint.save(tmp_path, 5, ADAPTER, EMPTY, {"which": 1})
    path.rename(tmp_path / f"{checkpoint.REPLACED}step-000005")
    left = checkpoint.latest(tmp_path)
    assert left is not None and checkpoint.load(left).extra == {"which": 1}
    checkpoint.rotate(tmp_path, 1)
    assert checkpoint.latest(tmp_path) == left


def reseal(path: Path) -> None:
    """Write a marker that matches files which a test has changed."""
    digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in checkpoint.FILES}
    (path / checkpoint.MARKER).write_text(json.dumps(digests))


def test_a_checkpoint_that_is_not_finite_is_skipped(tmp_path):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, ADAPTER, trained(adamw)[1].state_dict(), {})
    file = path / "optimizer.safetensors"
    states = load_file(file)
    states["optimizer.state.0.exp_avg"].flatten()[0] = float("nan")
    save_file(states, file)
    reseal(path)
    with pytest.raises(LorakitError, match=r"step-000002: optimizer.state.0.exp_avg is not finite; resume from anoth"):
        checkpoint.load(path)
    lines: list[str] = []
    assert checkpoint.newest_complete(tmp_path, lines.append) == tmp_path / "step-000001"
    assert len(lines) == 1 and lines[0].endswith("it is skipped")


def test_a_missing_or_unknown_tensor_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, ADAPTER, trained(adamw)[1].state_dict(), {})
    file = path / "adapter.safetensors"
    tensors = load_file(file)
    save_file({"a.down": tensors["a.down"]}, file)
    with pytest.raises(LorakitError, match=r"adapter.safetensors has changed since it was saved"):
        checkpoint.load(path)
    reseal(path)
    with pytest.raises(LorakitError, match=r"adapter.safetensors lacks tensor b.up; resume from another checkpoint"):
        checkpoint.load(path)
    save_file(tensors | {"c": torch.zeros(1), "d": torch.zeros(1)}, file)
    reseal(path)
    with pytest.raises(LorakitError, match=r"has an unknown tensor c and 1 more"):
        checkpoint.load(path)
    save_file(tensors, file)
    states = load_file(path / "optimizer.safetensors")
    del states["optimizer.state.0.exp_avg"]
    save_file(states, path / "optimizer.safetensors")
    reseal(path)
    with pytest.raises(LorakitError, match=r"optimizer.safetensors lacks tensor optimizer.state.0.exp_avg"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_truncated_or_missing_file_is_named(tmp_path, name):
    path = checkpoint.save(tmp_path, 1, ADAPTER, EMPTY, {})
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    with pytest.raises(LorakitError, match=f"{name} has changed since it was saved"):
        checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(LorakitError, match="is not a complete checkpoint"):
        checkpoint.load(path)


def settings(**changes) -> config.Config:
    return config.load(None, {"train.steps": 100} | {k.replace("__", "."): v for k, v in changes.items()})


def test_a_changed_config_is_refused_with_the_changes(tmp_path):
    path = checkpoint.save(tmp_path, 1, ADAPTER, EMPTY, {}, config=settings())
    assert checkpoint.load(path, config=settings()).step == 1
    # Paths may change; for files that affect a run, their identity is compared instead.
    assert checkpoint.load(path, config=settings(data__folder="/elsewhere", output__folder="/x")).step == 1
    with pytest.raises(LorakitError) as message:
        checkpoint.load(path, config=settings(train__seed=3, adapter__alpha=4.0, sample__prompts=("x",)))
    text = str(message.value)
    assert "train.seed (was 0, is 3)" in text and "adapter.alpha (was unset, is 4.0)" in text
    assert "sample.prompts" not in text and "lorakit train --preset " in text and "\n" not in text
    with pytest.raises(LorakitError, match=r"adapter.method \(was 'lora', is 'dora'\)"):
        checkpoint.load(path, config=settings(adapter__method="dora"))


def test_changed_photos_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, ADAPTER, EMPTY, {}, identity={"base": "1", "photos": "2"})
    assert checkpoint.load(path, identity={"base": "1", "photos": "2"}).step == 1
    with pytest.raises(LorakitError, match="the photos changed since step-000001 was saved"):
        checkpoint.load(path, identity={"base": "1", "photos": "3"})


def test_a_full_disk_is_reported_and_earlier_checkpoints_remain(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, ADAPTER, EMPTY, {})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.atomic.os, "fsync", full)
    message = r"step 2: no checkpoint could be written to .* \(No space left on device\); those before it are intact"
    with pytest.raises(LorakitError, match=message):
        checkpoint.save(tmp_path, 2, ADAPTER, EMPTY, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_a_kill_at_any_time_leaves_the_last_complete_checkpoint(tmp_path):
    """A folder is killed twenty times: every visible checkpoint is complete, and no reported save is lost."""
    moments = random.Random(0)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        child = os.fork()
        if child == 0:  # the child has torch loaded; twenty new interpreters would take a minute
            save_for_ever(folder)
        while checkpoint.latest(folder) is None:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in checkpoint.complete(folder):
            state = checkpoint.load(path)
            value = float(state.extra["round"])
            assert all((tensor == value).all() for tensor in state.adapter.values())
            assert all((entry["exp_avg"] == value).all() for entry in state.optimizer["state"].values())
        reported = int((folder / "reported").read_text() or 0) if (folder / "reported").exists() else 0
        rounds = [checkpoint.load(path).extra["round"] for path in checkpoint.complete(folder)]
        assert max(rounds) >= reported


def save_for_ever(folder: Path) -> None:
    """Save, rotate and report until killed; steps repeat, so that some kills interrupt a replacement."""
    number = 0
    while True:
        number += 1
        tensors = {str(n): torch.full((32, 32), float(number)) for n in range(4)}
        optimizer = {"state": {n: {"exp_avg": tensors[str(n)]} for n in range(4)}, "param_groups": []}
        checkpoint.save(folder, 7 + number // 4, tensors, optimizer, {"round": number})
        checkpoint.rotate(folder, 2)
        with (folder / "reported.tmp").open("w") as file:
            file.write(str(number))
        (folder / "reported.tmp").rename(folder / "reported")


def test_later_incomplete_checkpoints_are_renamed(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, ADAPTER, EMPTY, {})
    file = tmp_path / "step-000003" / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    lines: list[str] = []
    newest = checkpoint.newest_complete(tmp_path, lines.append)
    assert newest == tmp_path / "step-000002" and "has changed since it was saved" in lines[0]
    assert checkpoint.set_aside(tmp_path, newest) == ["unused-step-000003"]
    assert checkpoint.latest(tmp_path) == newest and (tmp_path / "unused-step-000003").is_dir()
    checkpoint.rotate(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "unused-step-000003"]


@pytest.mark.parametrize("name", ["step-000002", "2", "run/checkpoints/step-000002"])
def test_a_checkpoint_is_named_by_its_step(tmp_path, name):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, ADAPTER, EMPTY, {})
    assert checkpoint.named(tmp_path, name) == tmp_path / "step-000002"
    with pytest.raises(LorakitError, match="has no checkpoint step-9; it has step-000001, step-000002"):
        checkpoint.named(tmp_path, "step-9")


def test_a_deleted_run_folder_is_reported(tmp_path):
    with pytest.raises(LorakitError, match="run is gone: it was deleted or moved during training"):
        checkpoint.save(tmp_path / "run" / "checkpoints", 1, ADAPTER, EMPTY, {})
