"""Tests of resize, combine and merge, against numpy and against diffusers' base with an adapter."""

import numpy as np
import pytest
import random_adapters
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.core.errors import LorakitError
from lorakit.formats import kohya
from lorakit.formats.edit.extract import extract
from lorakit.formats.edit.merge_folder import merge_folder, merged
from lorakit.formats.edit.resize_combine import combine, resize

SHAPES = {
    "unet.mid_block.attentions.0.proj_in": (12, 16, 1, 1),
    "unet.mid_block.resnets.0.conv1": (12, 8, 3, 3),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (12, 16),
}


def delta(layer):
    return random_adapters.reference_delta(layer).reshape(layer.up.shape[0], -1)


@pytest.mark.parametrize("rank", [1, 3, 6, 10])
def test_resize_keeps_the_largest_singular_values(rank):
    weights = random_adapters.adapter(SHAPES, "sd1", rank=6, alpha=2)
    for name, layer in resize(weights, rank=rank).layers.items():
        left, values, right = np.linalg.svd(delta(weights.layers[name]), full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert layer.rank == min(rank, 6) and layer.down.shape[1:] == weights.layers[name].down.shape[1:]
        assert np.abs(delta(layer) - best).max() < 1e-6


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_resize_by_energy_keeps_the_smallest_sufficient_rank(energy):
    weights = random_adapters.adapter(SHAPES, "sd1", rank=6)
    for name, layer in resize(weights, energy=energy).layers.items():
        squares = np.linalg.svd(delta(weights.layers[name]), compute_uv=False)[:6] ** 2
        assert squares[: layer.rank].sum() >= (energy - 1e-9) * squares.sum()
        assert squares[: layer.rank - 1].sum() < energy * squares.sum()


def test_a_zero_layer_stays_zero():
    layer = LoraLayer(torch.ones(4, 8), torch.zeros(8, 4), 4.0)
    result = resize(AdapterWeights("sd1", "lora", {"x": layer}), energy=0.9).layers["x"]
    assert not result.delta().any() and torch.isfinite(result.down).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a rank or an energy, one of them"),
        ({"rank": 4, "energy": 0.5}, "give a rank or an energy, one of them"),
        ({"rank": 0}, "rank = 0: must be 1 or more"),
        ({"energy": 1.5}, "energy = 1.5: must be above 0 and at most 1"),
    ],
)
def test_wrong_resize_options_are_refused(options, message):
    with pytest.raises(LorakitError, match=message):
        resize(random_adapters.adapter(SHAPES, "sd1"), **options)


def test_combine_adds_deltas():
    first = random_adapters.adapter(SHAPES, "sd1", rank=3, alpha=6)
    some = {name: SHAPES[name] for name in list(SHAPES)[:2]}
    second = random_adapters.adapter(some, "sd1", rank=2, alpha=1, seed=1)
    result = combine([(first, 0.5), (second, -1.0)])
    assert set(result.layers) == set(SHAPES)
    for name, layer in result.layers.items():
        expected = 0.5 * delta(first.layers[name])
        expected = expected - delta(second.layers[name]) if name in some else expected
        assert np.abs(delta(layer) - expected).max() < 1e-6
        assert layer.rank == (5 if name in some else 3)


def test_combining_unlike_adapters_is_refused():
    one = random_adapters.adapter(SHAPES, "sd1")
    with pytest.raises(LorakitError, match="adapters for sd1 and sdxl do not go together"):
        combine([(one, 1.0), (random_adapters.adapter(SHAPES, "sdxl"), 1.0)])
    with pytest.raises(LorakitError, match="DoRA adapters do not add up"):
        combine([(one, 1.0), (random_adapters.adapter(SHAPES, "sd1", method="dora"), 1.0)])
    wider = {name: (shape[0] + 1, *shape[1:]) for name, shape in SHAPES.items()}
    with pytest.raises(LorakitError, match="has different shapes in the adapters"):
        combine([(one, 1.0), (random_adapters.adapter(wider, "sd1"), 1.0)])
    with pytest.raises(LorakitError, match="give at least one adapter"):
        combine([])


@pytest.mark.parametrize("strengths", [(1.0, -1.0), (0.3, -0.3), (0.0, 0.0)])
def test_strengths_that_sum_to_zero_are_refused(strengths):
    weights = random_adapters.adapter(SHAPES, "sd1", rank=6, alpha=2)
    with pytest.raises(LorakitError, match="add up to no change: give other strengths"):
        combine([(weights, strength) for strength in strengths])
    left = combine([(weights, 1.0), (weights, -0.999)])
    assert np.abs(delta(left.layers["unet.mid_block.resnets.0.conv1"])).max() > 0


@pytest.mark.parametrize("shape", [(12, 16), (12, 8, 3, 3)])
def test_merging_dora_equals_numpy(shape):
    """Each input column of V is scaled to the learned length. Half strength gives the mean of W and the result."""
    layer = random_adapters.layer(shape, 4, 2.0, torch.Generator().manual_seed(3), magnitude=True)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    plain = weight.double().numpy()
    adapted = plain + random_adapters.reference_delta(layer)
    lengths = np.sqrt((adapted**2).sum(axis=tuple(a for a in range(len(shape)) if a != 1), keepdims=True))
    expected = layer.magnitude.double().numpy() * adapted / lengths
    assert np.abs(merged(weight, layer).numpy() - expected).max() < 1e-5
    assert np.abs(merged(weight, layer, 0.5).numpy() - (plain + expected) / 2).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_merged_base_gives_the_outputs_of_base_and_adapter(request, tmp_path, family):
    folder = request.getfixturevalue(f"tiny_{family}")
    cls = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    pipeline = cls.from_pretrained(folder, dtype=torch.float32)
    weights = random_adapters.adapter(random_adapters.pipeline_shapes(pipeline), family, alpha=2)
    (path,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    merge_folder(weights, folder, tmp_path / "merged", strength=0.75)
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora(lora_scale=0.75)
    merged = cls.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, part, None) is None:
            continue
        fused = {n.replace(".base_layer", ""): p for n, p in getattr(pipeline, part).named_parameters()}
        for name, value in getattr(merged, part).named_parameters():
            assert torch.allclose(value, fused[name], atol=1e-5), name
    tensors = load_file(tmp_path / "merged" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in tensors)


def test_extract_gives_the_merged_adapter(tiny_sd1, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, dtype=torch.float32)
    shapes = random_adapters.pipeline_shapes(pipeline)
    weights = random_adapters.adapter(shapes, "sd1", rank=3, alpha=6)
    tuned = merge_folder(weights, tiny_sd1, tmp_path / "tuned")
    actual = extract(tiny_sd1, tuned, "sd1", rank=3)
    assert set(actual.layers) == set(shapes)
    for name, layer in actual.layers.items():
        assert layer.rank <= 3 and layer.down.shape[1:] == weights.layers[name].down.shape[1:]
        assert np.abs(delta(layer) - delta(weights.layers[name])).max() < 1e-5, name
    by_energy = extract(tiny_sd1, tuned, "sd1", energy=0.5)
    assert max(layer.rank for layer in by_energy.layers.values()) < 3


def test_extract_reports_unfit_models(tiny_sd1, tiny_sdxl, tmp_path):
    with pytest.raises(LorakitError, match="does not differ from sd1 in any layer"):
        extract(tiny_sd1, tiny_sd1, "sd1", rank=4)
    with pytest.raises(LorakitError, match=r"has no layer unet\..* like the base's: not the same kind of model"):
        extract(tiny_sd1, tiny_sdxl, "sd1", rank=4)
    with pytest.raises(LorakitError, match=r"not a base model in diffusers layout \(no (unet|text_encoder)/"):
        extract(tiny_sd1, tmp_path, "sd1", rank=4)


def test_merge_refuses_an_unfit_adapter(tiny_sd1, tmp_path):
    weights = random_adapters.adapter({"unet.up_blocks.7.attentions.0.proj_in": (8, 8)}, "sd1")
    with pytest.raises(LorakitError, match=r"the base has no layer unet.up_blocks.7.attentions.0.proj_in"):
        merge_folder(weights, tiny_sd1, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    other = random_adapters.adapter({"unet.mid_block.attentions.0.proj_in": (8, 8)}, "sd1")
    with pytest.raises(LorakitError, match="has another shape in the base"):
        merge_folder(other, tiny_sd1, tmp_path / "m")
    with pytest.raises(LorakitError, match="exists already; name a new folder"):
        merge_folder(weights, tiny_sd1, tmp_path)
    with pytest.raises(LorakitError, match="not a base model in diffusers layout"):
        merge_folder(weights, tmp_path, tmp_path / "m")
