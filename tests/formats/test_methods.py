"""Tests of every method in every format that carries it: other programs apply the trained delta W.

diffusers reads the kohya and diffusers formats, PEFT reads its folders, and LyCORIS reads LoHa and LoKr. Each kind
of layer occurs once.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import random_adapters
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from lycoris.modules import get_module, make_module
from peft import PeftModel
from safetensors.torch import load_file

from lorakit.adapters.weights import AdapterWeights, LokrLayer
from lorakit.core.errors import LorakitError
from lorakit.formats import diffusers, kohya, peft, read
from lorakit.formats.compatibility import predict_compatibility
from lorakit.formats.edit.resize_combine import combine, resize, to_lora
from lorakit.formats.inspect import inspect
from lorakit.formats.verify import verify_file

WRITERS = {"kohya": kohya, "diffusers": diffusers, "peft": peft}
RANK = 3
# alpha of 1, rank / 2, rank and 2 * rank; sd1 has all of them, because names, not alphas, depend on the family
ALPHAS = [("sd1", 1.0), ("sd1", RANK / 2), ("sd1", float(RANK)), ("sd1", 2.0 * RANK), ("sd2", RANK / 2), ("sdxl", 1.0)]
PLAIN, LYCORIS = ["lora", "rslora", "pissa"], ["loha", "lokr"]


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def base(request, tmp_path_factory):
    """Family, its small pipeline, and the shapes of one layer of every kind."""
    cls = StableDiffusionXLPipeline if request.param == "sdxl" else StableDiffusionPipeline
    if request.param == "sd2":
        folder = tiny.save_sd2(tmp_path_factory.mktemp("sd2") / "sd2")
    else:
        folder = request.getfixturevalue(f"tiny_{request.param}")
    pipeline = cls.from_pretrained(folder, dtype=torch.float32)
    return request.param, pipeline, random_adapters.one_of_each_kind(random_adapters.pipeline_shapes(pipeline))


def adapter_of(family, shapes, method, alpha):
    """Return random weights with the rank and alpha that training with this method gives."""
    if method == "rslora":
        return random_adapters.adapter(shapes, family, rank=RANK, alpha=alpha * RANK**0.5, method=method)
    if method == "pissa":
        return random_adapters.adapter(shapes, family, rank=2 * RANK, alpha=2 * alpha, method=method)
    return random_adapters.adapter(shapes, family, rank=RANK, alpha=alpha, method=method)


def write(weights, folder, fmt):
    path = folder / ("a" if fmt == "peft" else "a.safetensors")
    WRITERS[fmt].write(weights, path, dtype="fp32", metadata={})
    return path


def assert_equal(actual, weights, tolerance=1e-5):
    assert {name for name in actual if actual[name].abs().sum() > 0} == set(weights.layers)
    for name, layer in weights.layers.items():
        expected = random_adapters.reference_delta(layer)
        error = np.abs(actual[name].double().numpy().reshape(len(expected), -1) - expected.reshape(len(expected), -1))
        assert error.max() <= tolerance * max(1, np.abs(expected).max()), name


@pytest.mark.slow
@pytest.mark.parametrize(("base", "alpha"), ALPHAS, indirect=["base"], scope="module")
@pytest.mark.parametrize("fmt", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", PLAIN)
def test_diffusers_finds_the_delta(base, tmp_path, method, fmt, alpha):
    family, pipeline, shapes = base
    weights = adapter_of(family, shapes, method, alpha)
    path = write(weights, tmp_path, fmt)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    actual = random_adapters.applied_deltas(pipeline)
    pipeline.unload_lora_weights()
    assert_equal(actual, weights)


@pytest.mark.parametrize(("base", "alpha"), ALPHAS, indirect=["base"], scope="module")
@pytest.mark.parametrize("method", [*PLAIN, *LYCORIS])
def test_peft_finds_the_delta(base, tmp_path, method, alpha):
    family, pipeline, shapes = base
    weights = adapter_of(family, shapes, method, alpha)
    path = write(weights, tmp_path, "peft")
    parts = sorted({name.partition(".")[0] for name in shapes})
    opened = {part: PeftModel.from_pretrained(copy.deepcopy(getattr(pipeline, part)), path / part) for part in parts}
    bare = SimpleNamespace(**{part: model.base_model.model for part, model in opened.items()})
    assert_equal(random_adapters.applied_deltas(bare), weights)


@pytest.mark.parametrize(("base", "alpha"), ALPHAS, indirect=["base"], scope="module")
@pytest.mark.parametrize("method", LYCORIS)
def test_lycoris_finds_the_delta(base, tmp_path, method, alpha):
    family, _, shapes = base
    weights = adapter_of(family, shapes, method, alpha)
    tensors = load_file(write(weights, tmp_path, "kohya"))
    stems = kohya.keys.to_kohya_name(shapes, family)
    deltas = {}
    for name, shape in shapes.items():
        out, into, *kernel = shape
        layer = torch.nn.Conv2d(into, out, kernel) if kernel else torch.nn.Linear(into, out)
        module = make_module(*get_module(tensors, stems[name]), stems[name], layer)
        assert module.name == {"loha": "loha", "lokr": "kron"}[method]
        deltas[name] = module.get_weight(shape).detach()
    assert_equal(deltas, weights)


@pytest.mark.parametrize("first", ["kohya", "peft"])
@pytest.mark.parametrize("second", ["kohya", "peft"])
@pytest.mark.parametrize("method", LYCORIS)
def test_conversions_lose_nothing(base, tmp_path, method, first, second):
    family, _, shapes = base
    weights = adapter_of(family, shapes, method, 1.0)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    copy = read(write(weights, tmp_path / "one", first))
    path = write(copy, tmp_path / "two", second)
    back = read(path)
    assert (back.family, back.method) == (family, method)
    assert_equal({name: layer.delta() for name, layer in back.layers.items()}, weights, 1e-6)
    assert verify_file(path, weights, shapes) == []
    report = inspect(path)
    assert report.method == method and report.family == family
    failing = {key for key, reading in report.readers.items() if not reading.complete}
    lokr_on_convolutions = {"sd.cpp"} if method == "lokr" else set()
    kohya_readers = {"a1111", "forge", "comfyui", "invokeai", "sd-scripts", "sd.cpp", "diffusers"}
    expected = {"sd-scripts", "diffusers", "peft"} | lokr_on_convolutions if second == "kohya" else kohya_readers
    assert failing == expected


@pytest.mark.parametrize("method", LYCORIS)
def test_unsupported_methods_of_a_format_are_refused(base, tmp_path, method):
    family, _, shapes = base
    assert kohya.check(method, family) is None and peft.check(method, family) is None
    with pytest.raises(
        LorakitError, match=rf"diffusers format cannot carry {method}: .*lorakit resize FILE --energy 1"
    ):
        write(adapter_of(family, shapes, method, 1.0), tmp_path, "diffusers")
    assert predict_compatibility(method, "kohya")["diffusers"] == "it reads plain LoRA only"
    assert predict_compatibility(method, "kohya")["a1111"] == ""


@pytest.mark.parametrize("method", LYCORIS)
def test_resize_and_combine_give_plain_lora_with_the_same_delta(base, tmp_path, method):
    """`resize --energy 1`, which the refusal recommends, and `combine` both keep the delta."""
    family, pipeline, shapes = base
    weights = adapter_of(family, shapes, method, 2.0)
    assert_equal({name: layer.delta() for name, layer in to_lora(weights).items()}, weights)
    for changed in (resize(weights, energy=1.0), combine([(weights, 1.0)])):
        assert changed.method == "lora"
        assert_equal({name: layer.delta() for name, layer in changed.layers.items()}, weights)
    path = write(resize(weights, energy=1.0), tmp_path, "diffusers")
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    actual = random_adapters.applied_deltas(pipeline)
    pipeline.unload_lora_weights()
    assert_equal(actual, weights)


def test_a_lokr_with_factors_that_peft_does_not_use_is_refused(tmp_path):
    """The layer is divided by 2, where PEFT divides 16 into 4 * 4."""
    layer = LokrLayer((torch.ones(2, 2),), (torch.ones(8, 8),), 1.0)
    weights = AdapterWeights("sd2", "lokr", {"unet.mid_block.attentions.0.proj_in": layer})
    with pytest.raises(LorakitError, match="PEFT cuts a LoKr in another way; export it as kohya"):
        write(weights, tmp_path, "peft")


def test_several_methods_in_one_part_are_refused_by_peft(tmp_path):
    shapes = {f"unet.mid_block.attentions.0.{name}": (16, 16) for name in ("proj_in", "proj_out")}
    loha, lora = (random_adapters.adapter(shapes, "sd2", method=method).layers for method in ("loha", "lora"))
    mixed = dict(zip(shapes, [next(iter(loha.values())), next(iter(lora.values()))], strict=True))
    with pytest.raises(LorakitError, match="PEFT format has one method in each part of a model"):
        write(AdapterWeights("sd2", "lora", mixed), tmp_path, "peft")
    back = read(write(AdapterWeights("sd2", "lora", mixed), tmp_path, "kohya"))
    assert [layer.method for layer in back.layers.values()] == ["loha", "lora"]
