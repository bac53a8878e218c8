"""Tests that replaying a CUDA graph gives the step's result, and that a run continues without graphs.

Without a CUDA device, a stand-in for the graph computes again from the tensors of the capture.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import short_run
import torch
from safetensors.torch import load_file

from lorakit import adapters, config, families
from lorakit.core.events import Events
from lorakit.data import checks
from lorakit.engine import cuda_graphs, device as devices
from lorakit.runs import memory_estimate
from lorakit.training import run as train
from lorakit.training.loss_step import LossStep
from lorakit.training.optimizer_step import OptimizerStep
from lorakit.training.precompute import precompute

pytestmark = pytest.mark.usefixtures("copied_modules")


def stand_in(compute: cuda_graphs.Compute, generators: Any = ()) -> cuda_graphs.Compute:
    """Replay by calling `compute` again."""
    return compute


@dataclass(frozen=True)
class Row:
    """A batch of one tensor."""

    values: torch.Tensor


run_config = partial(short_run.run_config, steps=6, sample__every=100, train__validate_every=100)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos: a batch of two and a batch of one."""
    return short_run.noise(tmp_path_factory.mktemp("photos"), 3)


def step_of(settings: config.Config, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[LossStep, Any]:
    info = families.describe(settings.model.base)
    family = families.load(info, device, dtype, settings.memory.base_storage)
    family.acquire("unet")
    adapter = adapters.attach(family, settings.adapter, seed=0)
    encoded = precompute(settings, family, adapter, checks.check(settings.data, info), Events())
    step = LossStep(family, adapter, encoded, settings.train)
    for name, parameter in adapter.parameters().items():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator(device).manual_seed(len(name)))
    adapters.optimize_blocks(family, save_less=memory_estimate.use_save_less(settings, device))
    devices.gradient_checkpointing(family, memory_estimate.recomputed_blocks(settings, info, {}, device))
    return step, adapter


def both(step: LossStep, adapter: Any, capture: cuda_graphs.Capture, batches: int = 4) -> Any:
    """Yield for each batch the loss and gradients of the step and of its replay."""
    parameters = list(adapter.parameters().values())

    def backward(batch: Any) -> torch.Tensor:
        loss = step.loss_of(batch)
        loss.backward()
        return loss.detach()

    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    graphed = cuda_graphs.GraphedBackward(backward, parameters, capture, list(step.generators.values()))
    for index in range(batches):
        actual = []
        begin = partial(step.seed, index)
        for way in (lambda begin=begin: backward(begin()), lambda begin=begin: graphed(begin)):
            torch._foreach_zero_([parameter.grad for parameter in parameters])
            actual.append([way().clone(), *(parameter.grad.clone() for parameter in parameters)])
        yield actual


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["none", "images", "teacher"])
def test_replays_equal_each_batchs_step_bit_by_bit(tiny_sd1, photos, tmp_path, monkeypatch, prior):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    extra = {"train__class_images": 3} if prior == "images" else {}
    step, adapter = step_of(run_config(tiny_sd1, photos, tmp_path, train__prior=prior, **extra))
    losses = set()
    for without, graphed in both(step, adapter, stand_in):
        assert all(torch.equal(a, b) for a, b in zip(without, graphed, strict=True))
        losses.add(without[0].item())
    assert len(losses) == 4


SAVING = [{}, {"memory__gradient_checkpointing": True}, {"memory__base_storage": "nf4"}]


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVING[1:])
def test_options_that_save_memory_work_with_replay(tiny_sd1, photos, tmp_path, saving):
    settings = run_config(tiny_sd1, photos, tmp_path, **saving)
    for without, graphed in both(*step_of(settings), stand_in, 3):
        assert all(torch.equal(a, b) for a, b in zip(without, graphed, strict=True))


@pytest.mark.slow
def test_sdxls_sizes_and_pooled_texts_are_copied_to_the_graph(tiny_sdxl, photos, tmp_path):
    step, adapter = step_of(run_config(tiny_sdxl, photos, tmp_path))
    for without, graphed in both(step, adapter, stand_in, 3):
        assert all(torch.equal(a, b) for a, b in zip(without, graphed, strict=True))


RUNS = [
    {"optimizer__lr_scheduler": "cosine", "optimizer__warmup_steps": 2},
    {"train__gradient_accumulation_steps": 2},
    {"adapter__train_text_encoder": True, "train__prior": "teacher"},
    {"adapter__dropout": 0.3, "optimizer__name": "lion"},
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
@pytest.mark.parametrize("changes", RUNS)
def test_a_run_by_replay_gives_the_same_adapter(tiny_sd1, photos, tmp_path, monkeypatch, changes):
    def run(folder: str) -> tuple[dict[str, torch.Tensor], Any]:
        result = train.train(run_config(tiny_sd1, photos, tmp_path / folder, train__steps=4, **changes))
        checkpoint_folder = result.folder / "checkpoints" / "step-000004"
        state = json.loads((checkpoint_folder / "state.json").read_text(encoding="utf-8"))
        return load_file(result.adapter) | load_file(checkpoint_folder / "optimizer.safetensors"), state["optimizer"]

    plain, state = run("plain")
    monkeypatch.setattr(cuda_graphs, "capturer", lambda *arguments: (stand_in, "by replay"))
    graphed, other = run("graphed")
    assert plain.keys() == graphed.keys() and all(torch.equal(plain[name], graphed[name]) for name in plain)
    assert state == other  # the learning rate too, which was a tensor in between


def stale_finish(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
    """Repeat the passes but not the optimizer's step."""
    return compute if generators else lambda: torch.zeros(())


def fails(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
    compute()  # passes run before the capture fails; their gradients must not remain
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capture", "steps", "line"),
    [
        (fails, 2, "CUDA graphs are off, training continues without them: operation not permitted"),
        (
            stale_finish,
            4,
            "the optimizer step runs without a CUDA graph: the replayed optimizer step gives other bits",
        ),
    ],
)
def test_after_a_failed_capture_the_run_continues_and_reports_it(
    tiny_sd1, photos, tmp_path, monkeypatch, capture, steps, line
):
    plain = load_file(train.train(run_config(tiny_sd1, photos, tmp_path / "plain", train__steps=steps)).adapter)
    monkeypatch.setattr(cuda_graphs, "capturer", lambda *arguments: (capture, "by replay"))
    result = train.train(run_config(tiny_sd1, photos, tmp_path / "run", train__steps=steps))
    actual = load_file(result.adapter)
    assert all(torch.equal(plain[name], actual[name]) for name in plain)
    log = (result.folder / "log.jsonl").read_text(encoding="utf-8")
    assert log.count(line) == 1


def test_loading_another_state_captures_the_step_again():
    state, captured = [torch.zeros(3)], []

    def finish() -> torch.Tensor:
        return state[0].add_(1)

    finished = cuda_graphs.GraphedOptimizerStep(
        finish, lambda: state, lambda compute, _: captured.append(compute) or compute
    )
    for _ in range(3):
        finished()
    assert len(captured) == 1 and state[0].tolist() == [3, 3, 3]
    state[0] = torch.full((3,), 7.0)
    for _ in range(2):
        finished()
    assert len(captured) == 2 and state[0].tolist() == [9, 9, 9]


def test_a_graph_that_does_not_repeat_the_step_is_rejected():
    weight = torch.nn.Parameter(torch.ones(3))

    def backward(row: Row) -> torch.Tensor:
        loss = (weight * row.values).sum()
        loss.backward()
        return loss.detach()

    def stale(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
        compute()
        return lambda: torch.tensor(6.0)

    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(cuda_graphs.CaptureFailed, match="gradients by"):
        cuda_graphs.GraphedBackward(backward, [weight], stale)(lambda: Row(torch.tensor([1.0, 2.0, 3.0])))
    assert weight.grad.tolist() == [1.0, 2.0, 3.0]


def test_moved_memory_is_captured_again():
    weight, captured = torch.nn.Parameter(torch.ones(3)), []

    def backward(row: Row) -> torch.Tensor:
        loss = (weight * row.values).sum()
        loss.backward()
        return loss.detach()

    def capture(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
        captured.append(compute)
        return compute

    graphed = cuda_graphs.GraphedBackward(backward, [weight], capture)
    for _ in range(2):
        graphed(lambda: Row(torch.ones(3)))
    assert len(captured) == 1
    weight.data = weight.data.clone()
    graphed(lambda: Row(torch.ones(3)))
    assert len(captured) == 2 and weight.grad.tolist() == [3.0, 3.0, 3.0]


def test_shapes_beyond_the_limit_run_without_graphs(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    weight, captured = torch.nn.Parameter(torch.ones(1)), []

    def backward(row: Row) -> torch.Tensor:
        loss = (weight * row.values).sum()
        loss.backward()
        return loss.detach()

    graphed = cuda_graphs.GraphedBackward(backward, [weight], lambda compute, _: captured.append(compute) or compute)
    assert [graphed(lambda n=n: Row(torch.ones(n))).item() for n in (1, 2, 1, 3)] == [1, 2, 1, 3]
    assert len(captured) == 1


@pytest.mark.slow
def test_memory_of_graphs_can_be_freed(tiny_sd1, photos, tmp_path, monkeypatch):
    """Graphs are captured again after their memory was freed, and the results stay the same."""
    captured: list[Any] = []

    def capture(compute: cuda_graphs.Compute, generators: Any) -> cuda_graphs.Compute:
        captured.append(compute)
        return compute

    settings = run_config(tiny_sd1, photos, tmp_path)
    actual = []
    for discards in (False, True):
        monkeypatch.setattr(cuda_graphs, "capturer", lambda *_: (capture, ""))
        step, _ = step_of(settings)
        update = OptimizerStep(settings, step, 6, print)
        assert update.discard_graphs() is False
        captured.clear()
        for _ in range(2):  # the optimizer creates its state in its first step
            update(0)
        assert len(captured) == 2
        assert not discards or update.discard_graphs() is True
        update(0)
        assert len(captured) == 2 * (1 + discards)
        actual.append(update.flats[0].weights.detach().clone())
    assert torch.equal(*actual)
    monkeypatch.setattr(cuda_graphs, "capturer", lambda *_: (None, ""))
    assert OptimizerStep(settings, step_of(settings)[0], 6, print).discard_graphs() is False


def test_options_that_prevent_graphs_are_reported(tiny_sd1, photos, tmp_path):
    settings, cuda = run_config(tiny_sd1, photos, tmp_path), torch.device("cuda")
    assert cuda_graphs.capturer(settings, torch.device("cpu")) == (None, "")
    for section, change, reason in (
        ("memory", {"stream_base": True}, "memory.stream_base copies weights during the step"),
        ("memory", {"cuda_graphs": False}, "memory.cuda_graphs = false"),
        ("memory", {"gradient_checkpointing": True}, "dropout would draw different numbers on replay"),
    ):
        changed = replace(settings, **{section: replace(getattr(settings, section), **change)})
        changed = replace(changed, adapter=replace(changed.adapter, dropout=0.1))
        capture, line = cuda_graphs.capturer(changed, cuda)
        assert capture is None and line.startswith("CUDA graphs are off: ") and reason in line
        assert line.endswith("Training is correct, only slower.")


@pytest.mark.parametrize(
    ("noise", "off", "agrees"), [(0.0, 0.005, True), (0.0, 0.02, False), (0.015, 0.02, True), (0.04, 0.5, False)]
)
def test_a_graph_may_differ_as_much_as_two_steps_do(noise: float, off: float, agrees: bool) -> None:
    """In half precision some kernels add in varying order, which changes more than the last bits of the gradients."""
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.grad = torch.zeros(1000)
    draw = torch.Generator().manual_seed(0)

    def step(error: float) -> torch.Tensor:
        assert weight.grad is not None
        weight.grad += 1 + error * torch.randn(1000, generator=draw)
        return torch.ones(())

    def compare() -> Any:
        return cuda_graphs.verified([weight], lambda: step(noise), lambda: lambda: step(off))

    if agrees:
        compare()
    else:
        with pytest.raises(cuda_graphs.CaptureFailed, match="two passes without it"):
            compare()
    assert weight.grad.tolist() == [0.0] * 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("saving", "dtype"),
    list(zip(SAVING, [torch.bfloat16, torch.float32, torch.bfloat16], strict=True)),
)
def test_a_cuda_graph_gives_the_steps_result(tiny_sd1, photos, tmp_path, saving, dtype):
    settings = run_config(tiny_sd1, photos, tmp_path, memory__device="cuda", **saving)
    capture, line = cuda_graphs.capturer(settings, torch.device("cuda"))
    assert capture is not None and "CUDA graph" in line
    step, adapter = step_of(settings, "cuda", dtype)
    with devices.deterministic(config.TrainConfig(deterministic=True)):
        for without, graphed in both(step, adapter, capture):
            assert all(torch.equal(a, b) for a, b in zip(without, graphed, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [True, False])
def test_attention_over_many_keys_is_repeatable(deterministic: bool) -> None:
    """Deterministic kernels give equal bits; others add with atomics and agree within rounding."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v, towards = (torch.randn(1, 2, 4096, 40, generator=draw, device="cuda").bfloat16() for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    with devices.deterministic(config.TrainConfig(deterministic=deterministic)):
        first, second = (
            torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*leaves), leaves, towards)
            for _ in range(2)
        )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if deterministic else (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
