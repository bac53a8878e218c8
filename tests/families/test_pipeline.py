"""Tests that a diffusers pipeline in memory is the same base as its folder and that a run does not change it."""

from pathlib import Path
from typing import Any

import pytest
import tiny_sd3
import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from short_run import noise, run_config
from transformers import PreTrainedModel

import lorakit
from lorakit import config, families
from lorakit.core.errors import LorakitError

FACTS = (
    "family",
    "loader",
    "prediction_type",
    "latent_channels",
    "downscale",
    "max_tokens",
    "text_tokens",
    "cross_dim",
)
FACTS += ("layers", "untrained_layers", "bytes", "title", "clip_skip")


@pytest.fixture(scope="module")
def folders(tiny_sd1: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sd1": tiny_sd1, "sdxl": tiny_sdxl, "sd3": tiny_sd3.save_sd3(folder / "sd3", t5=True)}


@pytest.fixture
def pipeline(tiny_sd1: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_sd1)


def content(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return every weight with its address and `requires_grad`, and every module with its class and number of hooks."""
    facts: dict[str, Any] = {}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            facts |= {f"{name}.{k}": (w.clone(), w.data_ptr(), w.requires_grad) for k, w in part.named_parameters()}
            facts |= {f"{name}/{k}": (type(m), len(m._forward_pre_hooks)) for k, m in part.named_modules()}
    return facts


def assert_equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, fact in before.items():
        if isinstance(fact[0], torch.Tensor):
            assert torch.equal(fact[0], after[name][0]) and fact[1:] == after[name][1:], name
        else:
            assert fact == after[name], name


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_a_pipeline_is_the_same_base_as_its_folder(folders, name) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    before = content(pipeline)
    family = families.from_pipeline(pipeline)
    other = families.load(families.describe(folders[name]), "cpu", torch.float32)
    for fact in FACTS:
        assert getattr(family.info, fact) == getattr(other.info, fact) or fact == "bytes", fact
    assert family.prediction.__class__ is other.prediction.__class__
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn((1, family.info.latent_channels, 8, 8), generator=draw)
    predictions = []
    for each in (family, other):
        condition = each.encode_prompt("a photo of a (toy:1.2)")
        rows = {key: torch.tensor([row]) for key, row in each.size_conditions((64, 64), (0, 0), (64, 64)).items()}
        predictions.append(each.predict(noisy, torch.tensor([500]), condition.with_rows(**rows)))
    assert torch.equal(*predictions)
    pixels = torch.rand((1, 3, 64, 64), generator=draw)
    assert torch.equal(family.encode_image(pixels)[0], other.encode_image(pixels)[0])
    shared = {w.data_ptr() for w in family.denoiser.parameters()}
    assert shared == {w.data_ptr() for w in getattr(pipeline, family.info.spec.denoiser).parameters()}
    adapter = lorakit.attach(family, config.LoraConfig(rank=4))
    assert adapter.layers
    assert_equal(before, content(pipeline))


def test_the_hash_covers_weights_and_configurations(pipeline) -> None:
    first = families.describe_pipeline(pipeline).hash
    assert families.describe_pipeline(pipeline).hash == first
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] += 1
    assert families.describe_pipeline(pipeline).hash != first


@pytest.mark.slow
def test_a_run_in_memory_equals_the_run_from_the_folder(tiny_sd1, pipeline, tmp_path, monkeypatch) -> None:
    (photos := tmp_path / "photos").mkdir()
    noise(photos, 2)
    end = {"train__prior": "none", "sample__prompts": ()}
    first = lorakit.train(run_config(tiny_sd1, photos, tmp_path / "folder", 2, **end))
    before = content(pipeline)
    settings = run_config(Path("pocket"), photos, tmp_path / "memory", 2, train__save_every=1, **end)
    with monkeypatch.context() as nothing:
        for cls in (ModelMixin, PreTrainedModel):  # nothing may be loaded
            nothing.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
        events: list[lorakit.Event] = []
        with pytest.raises(lorakit.Stopped) as stopped:
            lorakit.train(
                settings,
                pipeline=pipeline,
                listeners=[events.append],
                stop=lambda: any(event.kind == "checkpoint" for event in events),
            )
        assert stopped.value.step == 1
        with pytest.raises(LorakitError, match=r"base <pipeline> is a pipeline in memory: give it to train or resume"):
            lorakit.resume(tmp_path / "memory")
        with torch.no_grad():
            pipeline.unet.conv_in.bias += 1
        with pytest.raises(LorakitError, match="base weights"):
            lorakit.resume(tmp_path / "memory", pipeline=pipeline)
        with torch.no_grad():
            pipeline.unet.conv_in.bias.copy_(before["unet.conv_in.bias"][0])
        second = lorakit.resume(tmp_path / "memory", pipeline=pipeline)
    assert_equal(before, content(pipeline))
    expected, weights = lorakit.load_adapter(first.adapter), lorakit.load_adapter(second.adapter)
    for name, layer in expected.layers.items():
        assert torch.equal(layer.up, weights.layers[name].up) and torch.equal(layer.down, weights.layers[name].down)
    applied = lorakit.apply(pipeline, weights)
    assert applied.layers == list(expected.layers)


def test_other_objects_than_pipelines_are_refused(pipeline) -> None:
    with pytest.raises(LorakitError, match="UNet2DConditionModel is no pipeline of diffusers: give one"):
        families.describe_pipeline(pipeline.unet)


def test_a_half_precision_pipeline_is_copied_for_a_float32_run(tiny_sd1) -> None:
    half = StableDiffusionPipeline.from_pretrained(tiny_sd1, dtype=torch.float16)
    info = families.describe_pipeline(half)
    family = families.load(info, "cpu", torch.float32)
    weight = half.unet.conv_in.weight
    assert torch.equal(family.denoiser.conv_in.weight, weight.float()) and weight.dtype is torch.float16
    assert info.variants["vae"] == "fp16" and families.from_pipeline(half).dtype is torch.float16


def _adapter(pipeline: Any) -> None:
    lorakit.attach(pipeline, config.LoraConfig(rank=4))


def _hooks(pipeline: Any) -> None:
    pipeline.unet.conv_in._hf_hook = object()


def _quantized(pipeline: Any) -> None:
    pipeline.unet.conv_in.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), False)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (_adapter, {}, "base sd1: unet carries an adapter: take it out first"),
        (_hooks, {}, "base sd1: hooks move or cast unet: load it without offloading"),
        (_quantized, {}, "base sd1: unet has no weights in full or half precision"),
        (lambda pipe: setattr(pipe, "vae", None), {}, "base sd1: the pipeline has no vae"),
        (lambda pipe: setattr(pipe, "tokenizer", None), {}, "base sd1: the pipeline has no tokenizer"),
        (lambda pipe: setattr(pipe, "text_encoder", None), {}, "without text_encoder"),
        (lambda pipe: None, {"model.base": "else"}, "model.base = 'else' and a pipeline in memory: give one of them"),
        (lambda pipe: None, {"model.vae": "else"}, "model.vae is for bases on the disk"),
        (lambda pipe: None, {"model.t5": False}, "model.t5 is for bases on the disk"),
    ],
)
def test_pipelines_that_cannot_be_trained_are_refused(pipeline, tmp_path, spoil, options, message) -> None:
    spoil(pipeline)
    (photos := tmp_path / "photos").mkdir()
    settings = config.load(
        None, {"data.folder": str(noise(photos, 1)), "data.name": "sks toy", "train.steps": 1, **options}
    )
    problems = lorakit.preflight(settings, pipeline=pipeline).problems
    assert any(message in problem for problem in problems), problems
