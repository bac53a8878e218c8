"""Tests of quantized weights against bitsandbytes: values, error, gradients, and no full copy saved for backward. Also
tests of weights in host memory: same bits as on the device, and moved only on purpose."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lorakit import adapters, config, families
from lorakit.adapters import adapter as adapter_module
from lorakit.config import ADAPTER_SECTIONS, LoraConfig
from lorakit.core.errors import LorakitError
from lorakit.core.registry import adapter_methods
from lorakit.engine import (
    device as devices,
    onednn_linear,
    quantized_kernels,
    quantized_weight,
    weight_storage,
)
from lorakit.inference import sampling
from lorakit.runs import plan
from lorakit.training import run as train

KINDS = ("int8", "nf4")
KINDS_OF_LAYER = (nn.Linear, nn.Conv2d)
# Root mean square error of normally distributed weights, relative to the weights' own.
ERROR = {"int8": (0.005, 0.012), "nf4": (0.085, 0.1)}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def relative(actual: torch.Tensor, right: torch.Tensor) -> float:
    return ((actual.float() - right.float()).norm() / right.float().norm()).item()


# -- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(320, 64), (32, 16, 3, 3)], ids=["linear", "conv"])
def test_nf4_equals_bitsandbytes(shape: tuple[int, ...]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes, an extra, is not installed")
    weight = normal(*shape)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantized_weight.quantize(weight, "nf4")
    assert torch.equal(ours.qdata, codes.flatten())
    assert torch.equal(ours.scales.flatten(), state.absmax)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(codes, state))


def test_int8_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes, an extra, is not installed")
    weight = normal(64, 320, dtype=torch.float16)
    codes, largest, _ = functional.int8_vectorwise_quant(weight)
    ours = quantized_weight.quantize(weight.float(), "int8")
    torch.testing.assert_close(ours.scales.flatten(), largest / 127)
    # bitsandbytes divides in float16, so a value between two codes may get the other code.
    assert (ours.qdata.int() - codes.int()).abs().max() <= 1
    assert (ours.qdata != codes).float().mean() < 0.01


def test_int8_gives_codes_computed_by_hand() -> None:
    weight = torch.tensor([[1.27, -0.64, 0.004], [0.0, 0.0, 0.0]])
    quantized = quantized_weight.quantize(weight, "int8")
    assert quantized.qdata.tolist() == [[127, -64, 0], [0, 0, 0]]
    torch.testing.assert_close(quantized.dequantize(), torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0]]))


def test_nf4_gives_codes_computed_by_hand() -> None:
    """Each byte holds two values, the first in the high half; a block of zeros stays zero."""
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([-2.0, 2.0, 0.6, 1.5])
    quantized = quantized_weight.quantize(weight, "nf4")
    assert quantized.qdata[:2].tolist() == [0x0F, 0xBE]
    assert quantized.qdata.shape == (64,)
    assert quantized.scales.tolist() == [[2.0], [0.0]]
    expected = torch.zeros(2, 64)
    expected[0, :4] = torch.tensor([-2.0, 2.0, 2 * quantized_kernels.NF4[11], 2 * quantized_kernels.NF4[14]])
    assert torch.equal(quantized.dequantize(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_and_size_match_the_documentation(kind: str, dtype: torch.dtype) -> None:
    weight = normal(320, 64, 3, 3, dtype=dtype)
    quantized = quantized_weight.quantize(weight, kind)
    low, high = ERROR[kind]
    assert low < relative(quantized.dequantize(), weight) < high
    assert (quantized.shape, quantized.dtype, quantized.device) == (weight.shape, dtype, weight.device)
    scale_bytes = weight.element_size() * (320 if kind == "int8" else weight.numel() // 64)
    assert quantized.storage_nbytes == weight.numel() // (1 if kind == "int8" else 2) + scale_bytes


def test_nf4_of_an_incomplete_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="65 values are not whole blocks of 64"):
        quantized_weight.quantize(torch.zeros(5, 13), "nf4")


# -- as a tensor ------------------------------------------------------------------------------------------------


def layers() -> list[tuple[nn.Module, torch.Tensor]]:
    """Return layers of every kind in a UNet: with and without bias, two or three axes, strided and 1x1 convolutions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            (nn.Linear(64, 128), normal(2, 7, 64)),
            (nn.Linear(64, 128, bias=False), normal(2, 7, 64)),
            (nn.Linear(64, 128), normal(3, 64)),
            (nn.Conv2d(64, 32, 3, padding=1), normal(2, 64, 6, 6)),
            (nn.Conv2d(64, 32, 3, padding=1, stride=2), normal(2, 64, 6, 6)),
            (nn.Conv2d(64, 32, 1), normal(2, 64, 6, 6)),
        ]


@pytest.mark.parametrize(("kind", "number"), list(itertools.product(KINDS, range(6))))
def test_a_quantized_layer_equals_the_full_one_and_saves_no_full_weight(kind: str, number: int) -> None:
    layer, value = layers()[number]
    layer.requires_grad_(False)
    small = copy.deepcopy(layer)
    quantized_weight.store_layers(small, kind, "cpu")
    layer.weight.copy_(small.weight.dequantize())  # type: ignore[operator]
    tensors: list[torch.Tensor] = []
    results = []
    for module in (small, layer):
        tensors.clear()
        leaf = value.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (tensors.append(t), t)[1], lambda t: t):
            output = module(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
        if module is small:
            kinds = [type(t) for t in tensors if t.shape in (layer.weight.shape, layer.weight.shape[::-1])]
            assert kinds == [quantized_weight.QuantizedWeight]
    for actual, right in zip(*results, strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_weight_moves_and_copies_with_its_module(kind: str) -> None:
    layer = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    quantized_weight.store_layers(layer, kind, "cpu")
    full = layer[0].weight.dequantize()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin[0].weight.dequantize(), full)
    assert torch.equal(layer.to("cpu")[0].weight.dequantize(), full)
    assert isinstance(layer[0].weight, nn.Parameter) and not layer[0].weight.requires_grad
    assert repr(layer[0].weight) == f"QuantizedWeight({kind}, (64, 64), torch.float32, cpu)"
    assert type(layer[0].weight.to(torch.bfloat16)) is torch.Tensor
    twin.to("meta")
    assert twin[0].weight.qdata.device.type == "meta"


def test_any_operation_dequantizes_the_weight() -> None:
    weight, other = quantized_weight.quantize(normal(64, 64), "int8"), normal(64, 64)
    full = weight.dequantize()
    assert torch.equal(torch.stack([weight, other, weight]), torch.stack([full, other, full]))
    assert torch.equal(torch.addmm(other, weight, other, beta=2), torch.addmm(other, full, other, beta=2))
    assert torch.equal(torch.where(other > 0, weight, other), torch.where(other > 0, full, other))


def test_a_quantized_weight_cannot_be_changed() -> None:
    weight = quantized_weight.quantize(normal(64, 64), "int8")
    with pytest.raises(
        LorakitError, match="a weight in int8 cannot be changed: load the base with its weights in full"
    ):
        weight += 1


# -- in a base --------------------------------------------------------------------------------------------------


def load(folder: Path, kind: str, *, stream: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return families.load(families.describe(folder), "cpu", dtype, kind, stream)


def predict(family: Any) -> torch.Tensor:
    condition = family.encode_text(["a photo of a toy"])
    condition = condition.with_sizes(family.size_conditions((64, 64), (0, 0), (64, 64)))
    return family.predict(normal(1, 4, 8, 8), torch.tensor([500]), condition)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_has_the_predicted_size_and_error(
    request: pytest.FixtureRequest, name: str, kind: str
) -> None:
    """Quantize all linear and convolutional layers of the UNet except the first, the last and the time embedding."""
    folder = request.getfixturevalue(name)
    full, small = load(folder, "full"), load(folder, kind)
    left = {
        path.partition(".")[0]
        for path, layer in small.denoiser.named_modules()
        if isinstance(layer, KINDS_OF_LAYER) and not isinstance(layer.weight, quantized_weight.QuantizedWeight)
    }
    assert left == set(weight_storage.UNQUANTIZED_LAYERS) & {
        path for path, child in small.denoiser.named_children() if list(child.parameters())
    }
    others = [*small.vae.parameters(), *(p for e in small.text_encoders.values() for p in e.parameters())]
    assert not any(isinstance(parameter, quantized_weight.QuantizedWeight) for parameter in others)
    assert not any(parameter.requires_grad for parameter in small.denoiser.parameters())
    with torch.no_grad():
        error = relative(predict(small), predict(full))
    assert 0 < error < {"int8": 0.02, "nf4": 0.35}[kind]
    weights = {
        path: layer.weight for path, layer in small.denoiser.named_modules() if isinstance(layer, KINDS_OF_LAYER)
    }
    rest = sum(p.nbytes for path, p in small.denoiser.named_parameters() if path.removesuffix(".weight") not in weights)
    predicted = sum(weight_storage.weight_nbytes(path, weight.shape, kind, 4) for path, weight in weights.items())
    assert quantized_weight.storage_nbytes(small.denoiser) == predicted + rest
    assert predicted < 0.4 * sum(weight.numel() * 4 for weight in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [("nf4", LoraConfig(rank=4, target_modules="linear+conv")), ("int8", LoraConfig(method="dora", rank=4))],
)
def test_an_adapter_has_the_gradients_of_the_dequantized_base(tiny_sd1: Path, kind: str, config: LoraConfig) -> None:
    """Gradients equal those of a base with the dequantized weights, also with checkpointing."""
    small, plain = load(tiny_sd1, kind), load(tiny_sd1, "full")
    with torch.no_grad():
        for place, parameter in small.denoiser.named_parameters():
            if isinstance(parameter, quantized_weight.QuantizedWeight):
                plain.denoiser.get_parameter(place).copy_(parameter.dequantize())
    on_small, on_plain = adapters.attach(small, config), adapters.attach(plain, config)
    gradients = []
    for family, adapter, checkpointing in ((small, on_small, False), (small, on_small, True), (plain, on_plain, False)):
        if checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        for name, parameter in adapter.parameters().items():
            parameter.grad = None
            if name.endswith(".up"):
                parameter.data.copy_(normal(*parameter.shape) * 0.1)
        predict(family).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in adapter.parameters().items()})
    for actual in gradients[:2]:
        for name, right in gradients[2].items():
            assert relative(actual[name], right) < 1e-4, name  # the kernels differ, so the rounding does


def test_peft_cannot_fuse_into_a_quantized_weight(tiny_sd1: Path) -> None:
    family = load(tiny_sd1, "nf4")
    adapter = adapters.attach(family, LoraConfig(rank=4))
    layer = adapter._layers[adapter.layers[0]]
    with pytest.raises(LorakitError, match="a weight in nf4 cannot be changed"):
        layer.merge(adapter_names=[adapter_module.NAME])


# -- in host memory ---------------------------------------------------------------------------------------------


def streams_of(module: nn.Module) -> set[Any]:
    return {
        p.host_slot.offloader
        for p in module.parameters()
        if isinstance(p, quantized_weight.QuantizedWeight) and p.host_slot is not None
    }


@pytest.mark.parametrize(("kind", "number"), list(itertools.product(("full", *KINDS), range(6))))
def test_a_streamed_layer_equals_a_resident_one(kind: str, number: int) -> None:
    layer, value = layers()[number]
    layer.requires_grad_(False)
    streamed = copy.deepcopy(layer)
    quantized_weight.store_layers(layer, kind, "cpu")
    quantized = quantized_weight.store_layers(streamed, kind, "cpu", offload=True)
    assert quantized is not None and getattr(layer.weight, "host_slot", None) is None
    results = []
    for module in (layer, streamed):
        leaf = value.clone().requires_grad_()
        output = module(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    for actual, right in zip(*results, strict=True):
        assert torch.equal(actual, right)
    assert quantized.requests >= 2 and quantized.bytes_copied == quantized.misses * streamed.weight.storage_nbytes


# Each adapter method, storage and precision once; DoRA in half precision with nf4.
LEARNED = [(method, "full", torch.float32) for method in adapter_methods()]
LEARNED += [("lora", "full", torch.bfloat16)]
LEARNED += [("lora", "int8", torch.float32), ("dora", "nf4", torch.bfloat16)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind", "dtype"), LEARNED)
def test_an_adapter_has_the_same_gradients_on_a_streamed_base(
    tiny_sd1: Path, method: str, kind: str, dtype: torch.dtype
) -> None:
    """Predictions and gradients have equal bits, with and without checkpointing. Resident full weights use kernels that
    round differently, some of them shared by q, k and v. So this test uses torch's and diffusers' own layers."""
    config = ADAPTER_SECTIONS[method](method=method, rank=4, target_modules="linear+conv")
    results: list[list[torch.Tensor]] = []
    for stream in (False, True):
        family = load(tiny_sd1, kind, stream=stream, dtype=dtype)
        for layer in family.denoiser.modules():
            if type(layer) is onednn_linear.FrozenLinear:
                layer.__class__ = nn.Linear
        for parameter in family.denoiser.parameters():
            if not isinstance(parameter, quantized_weight.QuantizedWeight):
                # Weights from a file keep the file's alignment, and MKL's last bits depend on the address.
                parameter.data = parameter.clone()
        adapter = adapters.attach(family, config, seed=1)
        for number, parameter in enumerate(adapter.parameters().values()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        if kind != "full":
            adapters.optimize_blocks(family)
        results.append([])
        for checkpointing in (False, True):
            (family.denoiser.enable_gradient_checkpointing if checkpointing else lambda: None)()
            for _ in range(2):
                for parameter in adapter.parameters().values():
                    parameter.grad = None
                prediction = predict(family)
                prediction.square().mean().backward()
                results[-1] += [prediction.detach(), *(p.grad.clone() for p in adapter.parameters().values())]
    for right, actual in zip(*results, strict=True):
        assert torch.equal(actual, right)
    (quantized,) = streams_of(family.denoiser)
    # Checkpointing changes the access order; each order is known from its second step on.
    assert quantized.misses < 0.5 * quantized.requests


def test_a_streamed_base_stays_in_host_memory(tiny_sdxl: Path) -> None:
    """Moving the module does not move streamed weights; only layers that are never quantized are resident."""
    family, plain = load(tiny_sdxl, "full", stream=True), load(tiny_sdxl, "full")
    (stream,) = streams_of(family.denoiser)
    weights = {
        path: layer.weight for path, layer in family.denoiser.named_modules() if isinstance(layer, KINDS_OF_LAYER)
    }
    for path, weight in weights.items():
        assert isinstance(weight, quantized_weight.QuantizedWeight) == weight_storage.is_quantizable(
            path, weight.numel()
        )
    there = [weight for weight in weights.values() if isinstance(weight, quantized_weight.QuantizedWeight)]
    assert stream.host_bytes >= sum(weight.storage_nbytes for weight in there)
    places = [weight.qdata.data_ptr() for weight in there]
    with torch.no_grad():
        predict(family)
        predict(family)
        assert stream._on_device
        family.denoiser.to("meta")
    assert not stream._on_device  # a base that leaves the device frees its window
    there = [p for p in family.denoiser.parameters() if isinstance(p, quantized_weight.QuantizedWeight)]
    assert {weight.device.type for weight in there} == {"meta"} and [w.qdata.data_ptr() for w in there] == places
    for path, right in plain.denoiser.named_parameters():
        actual = family.denoiser.get_parameter(path)
        if isinstance(actual, quantized_weight.QuantizedWeight):
            assert not actual.requires_grad and torch.equal(actual.to("cpu").dequantize(), right)


def test_on_another_device_a_streamed_weight_is_moved_per_operation() -> None:
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    right = layer.weight.clone()
    quantized = quantized_weight.store_layers(layer, "full", "meta", offload=True)
    assert quantized is not None
    assert repr(layer.weight) == "QuantizedWeight(full, (64, 64), torch.float32, cpu for meta)"
    assert layer(torch.ones(1, 64, device="meta")).device.type == "meta" and quantized.requests == 1
    layer.to("cpu")
    assert (
        torch.equal(layer.weight.dequantize(), right)
        and layer.weight.dequantize().data_ptr() == layer.weight.qdata.data_ptr()
    )
    assert quantized.requests == 1


def test_a_streamed_weight_cannot_be_changed() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    quantized_weight.store_layers(layer, "full", "cpu", offload=True)
    with pytest.raises(LorakitError, match="a weight in the host's memory cannot be changed: load the base with its"):
        layer.weight += 1


WIDTH = 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["full", "int8", "nf4"])
def test_on_a_gpu_a_streamed_step_is_equal_and_needs_less_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 layers are checkpointed in groups of eight, and the window holds eight: equal gradients, lower peak memory."""
    monkeypatch.setattr(weight_storage, "WINDOW_BYTES", 8 * 2 * WIDTH**2)
    peaks, gradients = [], []
    for streamed in (False, True):
        with torch.random.fork_rng(devices=["cuda"]):
            torch.manual_seed(0)
            blocks = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8))) for _ in range(8)]
            model = nn.Sequential(*blocks).to(torch.bfloat16).requires_grad_(False)
            value = torch.randn(16, WIDTH, dtype=torch.bfloat16)
        if kind != "full" or streamed:
            quantized = quantized_weight.store_layers(model, kind, "cuda", offload=streamed)
        model.to("cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            leaf = value.cuda().requires_grad_()
            hidden = leaf
            for block in blocks:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            hidden.float().square().sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append(leaf.grad.clone())
        del model, blocks, block
    assert torch.equal(*gradients)
    weights = 64 * WIDTH**2 * {"full": 2, "int8": 1, "nf4": 0.5}[kind]
    if kind == "full":
        assert peaks[1] < peaks[0] - weights / 2
    assert quantized is not None and quantized.misses < quantized.requests / 2


@pytest.mark.slow
def test_a_run_on_a_streamed_base_gives_the_same_adapter(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run, including samples and the checked file, equals a run without streaming. The test disables only the
    check for a GPU."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.setattr(devices, "streams", lambda config, device: config.stream_base)
    monkeypatch.setattr(plan, "may_be_cuda", lambda setting: True)
    results = []
    for stream in (False, True):
        settings = {
            "model.base": str(tiny_sd1),
            "data.folder": str(tmp_path / "photos"),
            "data.name": "sks toy",
            "data.resolution": 64,
            "optimizer.learning_rate": 0.01,
            "train.steps": 2,
            "memory.device": "cpu",
            "memory.base_storage": "int8",
            "memory.stream_base": stream,
            "sample.steps": 2,
            "sample.at_start": False,
            "sample.every": 2,
            "train.validate_every": 2,
            "train.validate_at_end": False,
            "output.folder": str(tmp_path / f"run-{stream}"),
        }
        results.append(train.train(config.load(None, settings)))
    weights = [load_file(result.adapter) for result in results]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(finding.passed for finding in results[1].findings)
    log = (results[1].folder / "log.jsonl").read_text(encoding="utf-8")
    assert "(the UNet's weights kept in int8 in the host's memory)" in log
    recorded = sampling.recorded(results[1].adapter, {})
    assert recorded.memory.stream_base
    files = sampling.from_file(
        results[1].adapter, str(tiny_sd1), [], [1.0], recorded.sample, folder=tmp_path / "drawn", memory=recorded.memory
    )
    last = sorted((results[1].folder / "samples" / "step-000002").glob("*.png"))
    assert [file.read_bytes() for file in files[1:]] == [file.read_bytes() for file in last]
