"""Tests of training a base's own weights: results equal a plain loop's, and every file has the trained weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import short_run
import small_models
import torch
from safetensors.torch import load_file

from lorakit import config, families
from lorakit.config import ConfigError
from lorakit.core.errors import LorakitError, Stopped
from lorakit.formats.edit import merge
from lorakit.runs.preflight import preflight
from lorakit.training import checkpoint_export, run as train
from lorakit.training.whole_model import export, step
from lorakit.training.whole_model.weights import ModelWeights

pytestmark = pytest.mark.usefixtures("copied_modules")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_run.noise(tmp_path_factory.mktemp("photos"), 4)


def full(base: Path, photos: Path, folder: Path, steps: int, **changes: Any) -> config.Config:
    own: dict[str, Any] = {
        "adapter.method": "full",
        "adapter.outputs": ("folder", "adapter"),
        "optimizer.learning_rate": 1e-3,
        "output.dtype": "fp16",
    }
    return short_run.run_config(base, photos, folder, steps, **own | changes)


def plain(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return families.load(families.describe(base), "cpu", dtype, plain=True)


def model_weights(family: Any, **options: Any) -> ModelWeights:
    settings = config.load(
        None, {"train.steps": 1, "adapter.method": "full", "adapter.train_text_encoder": True, **options}
    )
    return ModelWeights(family, settings.adapter)  # type: ignore[arg-type]


def loss_step(family: Any, adapter: ModelWeights) -> Any:
    """Return a replacement of `LossStep` with the same loss for both loops."""
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(family.dtype)

    def loss(index: int) -> torch.Tensor:
        condition = family.encode_tokens(family.tokens(["a sks toy", "a toy"]), grad=True)
        timesteps = torch.tensor([100 + 50 * index, 700])
        return (family.predict(noisy, timesteps, condition) - noisy.float().flip(0)).square().mean()

    return SimpleNamespace(family=family, adapter=adapter, loss=loss, retry=0)


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_layerwise_step_equals_a_plain_loop_with_all_gradients(tiny_sd1: Path, parts: int) -> None:
    options = {"train.steps": 3, "train.gradient_accumulation_steps": parts, "train.max_grad_norm": 0.1}
    settings = config.load(None, {"adapter.method": "full", "optimizer.learning_rate": 1e-3, **options})
    ours, theirs = (plain(tiny_sd1) for _ in range(2))
    adapter = model_weights(ours)
    update = step.LayerwiseStep(settings, loss_step(ours, adapter), 3, print)
    reference = model_weights(theirs)
    weights = list(reference.parameters().values())
    rate = torch.tensor(1e-3).item()  # the schedule rounds the rate to float32
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01, fused=True)
    for number in range(3):
        _, norm = update(number)
        for part in range(parts):
            (loss_step(theirs, reference).loss(number * parts + part) / parts).backward()
        norms = [torch.nn.utils.clip_grad_norm_([weight], 0.1) for weight in weights if weight.grad is not None]
        torch.testing.assert_close(norm, torch.stack(norms).norm())
        optimizer.step()
        optimizer.zero_grad()
    assert all(weight.grad is None for weight in adapter.parameters().values())
    for name, weight in adapter.parameters().items():
        assert torch.equal(weight, reference.parameters()[name]), name


def test_only_one_gradient_exists_at_a_time(sd1: Any) -> None:
    adapter = model_weights(family := copy.deepcopy(sd1))
    settings = config.load(None, {"train.steps": 1, "adapter.method": "full"})
    update, largest = step.LayerwiseStep(settings, loss_step(family, adapter), 1, print), 0

    def count(_: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, sum(weight.grad is not None for weight in adapter.parameters().values()))

    for weight in adapter.parameters().values():
        weight.register_post_accumulate_grad_hook(count)
        weight.register_hook(lambda gradient: count(gradient))
    update(0)
    assert largest <= 1


def test_stochastic_rounding_is_unbiased_and_keeps_bf16_values() -> None:
    values = torch.tensor([1.001, -3.3e-5, 7.77e4]).repeat(20000, 1)
    rounded = step.round_at_random(values, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(rounded.mean(0), values[0], rtol=2e-4, atol=0)
    assert all(len(column.unique()) == 2 for column in rounded.T)
    exact = torch.tensor([1.5, -0.0, float("inf"), float("nan")])
    assert bool(step.round_at_random(exact, torch.Generator())[3].isnan())
    assert torch.equal(step.round_at_random(exact[:3], torch.Generator()), exact[:3].bfloat16())


def test_small_steps_are_not_lost_in_bf16(tiny_sd1: Path) -> None:
    """A step of 1e-5 is below half a unit of most bf16 weights: rounded to nearest, these weights would not change."""
    family = plain(tiny_sd1, torch.bfloat16)
    adapter = model_weights(family)
    before = {name: weight.detach().clone() for name, weight in adapter.parameters().items()}
    settings = config.load(None, {"train.steps": 1, "adapter.method": "full", "optimizer.learning_rate": 1e-5})
    step.LayerwiseStep(settings, loss_step(family, adapter), 1, print)(0)
    changed = sum(int((weight != before[name]).sum()) for name, weight in adapter.parameters().items())
    total = sum(weight.numel() for weight in before.values())
    assert 0.005 < changed / total < 0.3


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_bits_and_files(tiny_sd1: Path, photos: Path, tmp_path: Path) -> None:
    options = {
        "adapter__train_text_encoder": True,
        "memory__mixed_precision": "bf16",
        "train__save_every": 1,
    }
    straight = train.train(full(tiny_sd1, photos, tmp_path / "straight", 3, **options))
    assert [finding.detail for finding in straight.findings if not finding.passed] == []
    assert straight.exports.keys() == {"folder", "kohya"}
    steps_of_it: list[int] = []
    with pytest.raises(Stopped):
        train.train(
            full(tiny_sd1, photos, tmp_path / "stopped", 3, **options),
            listeners=[lambda event: steps_of_it.append(event.step) if event.kind == "step" else None],
            stop=lambda: (tmp_path / "stopped" / "checkpoints" / "step-000001" / "complete").is_file(),
        )
    assert max(steps_of_it) < 3
    train.resume(tmp_path / "stopped")
    files = [
        tmp_path / name / "checkpoints" / "step-000003" / file
        for file in ("adapter.safetensors", "optimizer.safetensors")
        for name in ("straight", "stopped")
    ]
    for one, other in (files[:2], files[2:]):
        assert one.read_bytes() == other.read_bytes()
    trained = load_file(files[0])
    read = plain(straight.exports["folder"], torch.bfloat16)
    assert {name for name, _ in export.named_weights(read)} == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in export.named_weights(read))
    base = dict(export.named_weights(plain(tiny_sd1, torch.bfloat16)))
    assert sum(torch.equal(weight, base[name]) for name, weight in trained.items()) <= 2
    with pytest.raises(LorakitError, match=r"a checkpoint of a whole model is no adapter: set train\.export_every"):
        checkpoint_export.read(files[0].parent)


@pytest.mark.slow
def test_a_model_is_saved_as_one_file_and_the_base_restored(tmp_path: Path) -> None:
    modules = small_models.small("sd1", tmp_path / "base")
    base = small_models.write(tmp_path / "base.safetensors", "sd1", modules, torch.float32)
    source = config.load(None, {"train.steps": 1, "model.base": str(base), "model.tokenizer": str(tmp_path / "base")})
    family = families.load(families.describe(source.model), "cpu", torch.float32, plain=True)
    before = {name: weight.clone() for name, weight in export.named_weights(family)}
    adapter = model_weights(family)
    with torch.no_grad():
        for weight in adapter.parameters().values():
            weight.add_(torch.randn_like(weight) * 0.01)
    model = adapter.weights()
    with adapter.disabled():
        assert all(torch.equal(weight, before[name]) for name, weight in export.named_weights(family))
    file = merge.merge(model, model.base, tmp_path / "m-model.safetensors")
    described = families.describe(replace(source.model, base=str(file)))
    assert export._weights_finding("file", families.load(described, "cpu", torch.float32, plain=True), model).passed
    adapter.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in export.named_weights(family))
    finding = export._weights_finding("file", family, model)
    assert not finding.passed and "not as trained" in finding.detail


REFUSALS = {
    "unknown option adapter.rank with adapter.method = 'full': leave it out": {"adapter.rank": 8},
    "unknown option adapter.alpha with adapter.method": {"adapter.alpha": 8.0},
    "unknown option adapter.new_tokens with adapter.method": {"adapter.new_tokens": 2},
    "unknown option adapter.target_modules with adapter.method": {"adapter.target_modules": "linear"},
    "memory.base_storage is for frozen ones, leave it out": {"memory.base_storage": "nf4"},
    "memory.stream_base is for frozen ones, leave it out": {"memory.stream_base": True},
    "memory.compile is for an adapter's blocks": {"memory.compile": True},
    "which float16 is too coarse for": {"memory.mixed_precision": "fp16"},
    "choose 'images', as DreamBooth does": {"train.prior": "teacher"},
    "train.ema_decay needs memory.mixed_precision = 'fp32'": {"train.ema_decay": 0.9},
    "which optimizer.name = 'prodigy' cannot: choose one of adamw": {"optimizer.name": "prodigy"},
    "which optimizer.name = 'torch.optim:SGD' cannot": {"optimizer.name": "torch.optim:SGD"},
    "train.max_weight_norm needs a method whose change is": {"train.max_weight_norm": 1.0},
    "optimizer.loraplus_lr_ratio is for": {"optimizer.loraplus_lr_ratio": 4.0},
    "train.init_from makes no sense": {"train.init_from": "x.safetensors"},
    "adapter.extract_rank is for the extracted LoRA": {"adapter.extract_rank": 8},
    "output.formats is for the extracted LoRA": {"output.formats": ("peft",)},
    "output.dtype is for the extracted LoRA": {"output.dtype": "bf16"},
    "adapter.outputs = []": {"adapter.outputs": ()},
}


@pytest.mark.parametrize(("message", "options"), list(REFUSALS.items()))
def test_unfit_options_of_full_training_are_refused_in_one_line(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(None, {"train.steps": 1, "adapter.method": "full"} | options)
    assert [line for line in str(error.value).splitlines() if message in line] == str(error.value).splitlines()


def test_a_method_replaces_the_presets_options() -> None:
    loaded = config.load("subject-sd15-lowmem", {"adapter.method": "full", "train.prior": "images"})
    assert (loaded.optimizer.learning_rate, loaded.memory.base_storage) == (5e-6, "full")
    assert config.load("subject-sd15", {"adapter.method": "loha"}).adapter.rank == 16


def test_the_plan_counts_trained_weights_without_loading_a_model(
    sd1: Any, tiny_sd1: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = full(tiny_sd1, photos, tmp_path / "run", 2, adapter__train_text_encoder=True)
    ready = preflight(settings)
    assert ready.plan is not None
    assert ready.plan.modules == model_weights(copy.deepcopy(sd1)).describe()
    assert any("the base's own weights are trained at the rate 0.001" in line for line in ready.plan.lines())
    assert any("for adapter.method = 'full' 5e-06 is usual" in line for line in ready.warnings)
    for base, what in ((tiny_sd1, "unet's attention_head_dim of base sd1"), ("pocket", "of base pocket,")):
        problems = preflight(full(Path(base), photos, tmp_path / "run", 2, adapter__outputs=("file",))).problems
        assert any("one file does not tell" in line and what in line for line in problems), problems
    monkeypatch.setattr("lorakit.runs.nvidia.lacks_bf16", lambda: True)
    monkeypatch.setattr("lorakit.runs.nvidia.has_driver", lambda: True)
    card = preflight(full(tiny_sd1, photos, tmp_path / "run", 2, memory__device="auto"))
    assert any("this card has no bf16, and float16 is too coarse" in line for line in card.problems)
    half = copy.deepcopy(sd1)
    half.dtype = torch.float16
    with pytest.raises(LorakitError, match="float16 is too coarse for a model's own weights"):
        model_weights(half)
    in_memory = preflight(full(Path("pocket"), photos, tmp_path / "run", 2), pipeline=sd1.pipeline())
    assert any("a pipeline in memory stays as it is" in line for line in in_memory.problems)
