"""Verify that an exported file is the trained adapter: read it again and compare it layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorakit.adapters.weights import AdapterWeights, AnyLayer, ForeignLayer, LoraLayer
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.formats import embeddings
from lorakit.formats.identify import PEFT_MODEL
from lorakit.formats.reading import read
from lorakit.formats.spec import FormatSpec, of_file

# Largest difference of a delta W from the one in memory, relative to its norm: two roundings in the file's dtype.
TOLERANCE = {"F32": 1e-5, "F16": 2e-3, "BF16": 1.6e-2}
NO_EFFECT = 1e-7  # relative to the base's output


@dataclass(frozen=True)
class Finding:
    """A fault of an exported file: its place (a layer, a tensor or a component), and the problem."""

    where: str
    problem: str

    def __str__(self) -> str:
        return Message("{name}: {detail}", self.where, self.problem)


def verify_file(path: Path, weights: AdapterWeights, layers: Iterable[str]) -> list[Finding]:
    """Read an exported file or PEFT folder and compare it with the weights in memory.

    Checked: the file has exactly the tensors of the format, with the right shapes; every announced layer is finite, not
    zero, and its delta W (and magnitude) agree within the file's precision; other layers are zero.

    Args:
        layers: canonical names of the trained layers.

    Returns:
        The faults; empty if the file is correct.
    """
    findings: list[Finding] = []
    if not weights.layers:
        return _word_findings(Path(path), weights)
    try:
        heads = _headers(path)
        spec = of_file(Path(path), (name for head in heads.values() for name in head.tensors))
        copy = read(path)
    except LorakitError as error:
        return [Finding(Path(path).name, str(error))]
    findings += _tensor_findings(spec, weights, heads)
    dtypes = {info.dtype for head in heads.values() for name, info in head.tensors.items() if _is_factor(name)}
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    findings += _family_findings(Path(path), copy, weights)
    for name in layers:
        if name not in weights.layers:
            findings.append(Finding(name, "announced, but not trained"))
        elif name not in copy.layers:
            findings.append(Finding(name, "announced, but not in the file"))
        else:
            problem = difference(weights.layers[name], copy.layers[name], tolerance)
            findings += [Finding(name, problem)] if problem else []
    for name, layer in copy.layers.items():
        if name not in weights.layers and bool(torch.count_nonzero(layer.delta())):
            findings.append(Finding(name, "in the file, but not trained"))
    findings += [Finding(word, problem) for word, problem in embeddings.problems(copy.embeddings, weights.embeddings)]
    if spec.bundles_embeddings and weights.embeddings:
        findings += _bundle_findings(embeddings.bundle(Path(path)), load_file(Path(path)), weights)
    return findings


def _word_findings(path: Path, weights: AdapterWeights) -> list[Finding]:
    """The faults of the file of a word without an adapter."""
    try:
        copy = read(path, embedding=True)
    except LorakitError as error:
        return [Finding(path.name, str(error))]
    if wrong := _family_findings(path, copy, weights):
        return wrong
    return [Finding(word, problem) for word, problem in embeddings.problems(copy.embeddings, weights.embeddings)]


def _family_findings(path: Path, copy: AdapterWeights, weights: AdapterWeights) -> list[Finding]:
    if copy.family == weights.family:
        return []
    return [Finding(path.name, Message("reads as {family}, not {other}", copy.family, weights.family))]


def _bundle_findings(bundle: Path, tensors: Mapping[str, torch.Tensor], weights: AdapterWeights) -> list[Finding]:
    """The faults of a bundled file: it must have the same tensors, and the words."""
    if not bundle.is_file():
        return [Finding(bundle.name, "missing")]
    own, words = embeddings.unbundle(load_file(bundle))
    equal = own.keys() == tensors.keys() and all(torch.equal(own[name], tensors[name]) for name in own)
    findings = [] if equal else [Finding(bundle.name, "its adapter is not that of the file beside it")]
    return findings + [
        Finding(f"{bundle.name} {word}", text) for word, text in embeddings.problems(words, weights.embeddings)
    ]


def _headers(path: Path) -> dict[str, safetensors_header.Header]:
    """The headers of a file ("" -> header) or of a PEFT folder (component -> header)."""
    if not Path(path).is_dir():
        return {"": safetensors_header.read(Path(path))}
    return {f.parent.name: safetensors_header.read(f) for f in sorted(Path(path).glob(f"*/{PEFT_MODEL}"))}


def _is_factor(name: str) -> bool:
    return not name.endswith((".alpha", ".dora_scale"))


def _tensor_findings(
    spec: FormatSpec, weights: AdapterWeights, heads: Mapping[str, safetensors_header.Header]
) -> list[Finding]:
    """Tensors that are missing, unexpected, or of another shape than the format's writer creates."""
    tensors = spec.tensors(weights, "fp32")
    expected = tensors if spec.is_folder else {"": tensors}
    findings = [Finding(part, "component missing") for part in expected.keys() - heads.keys()]
    for part in expected.keys() & heads.keys():
        shapes = {name: tuple(tensor.shape) for name, tensor in expected[part].items()}
        there = heads[part].shapes()
        findings += [Finding(name, "missing") for name in shapes if name not in there]
        findings += [Finding(name, "not expected") for name in there if name not in shapes]
        findings += [
            Finding(name, Message("shape {shape}, expected {other}", there[name], shape))
            for name, shape in shapes.items()
            if there.get(name, shape) != shape
        ]
    return findings


def difference(trained: AnyLayer, copy: AnyLayer, tolerance: float) -> str | None:
    """The difference between a trained layer and the one in a file as a message, or None. `tolerance` is relative to
    the norm of the trained delta W."""
    if isinstance(trained, ForeignLayer):
        return _parts_difference(trained.parts, copy.factors(), tolerance)
    shapes = [_shape(layer) for layer in (trained, copy)]
    if shapes[0] != shapes[1]:
        return Message("delta W is {shapes}, expected {other}", shapes[1], shapes[0])
    if not all(bool(torch.isfinite(tensor).all()) for tensor in copy.factors().values()):
        return "not finite"
    if trained.magnitude is None and _norm([copy]) == 0:
        return "zero: it has no effect"
    error, size = _norm([copy, trained], [1, -1]), _norm([trained])
    if not error <= tolerance * size:  # written as `not <=`, so that NaN fails
        return Message("delta W is off by {value:.3g} %", 100 * error / max(size, 1e-30))
    if (trained.magnitude is None) != (copy.magnitude is None):
        return "DoRA magnitude missing" if copy.magnitude is None else "DoRA magnitude that was not trained"
    if trained.magnitude is None or copy.magnitude is None:
        return None
    close = torch.allclose(trained.magnitude.float().flatten(), copy.magnitude.flatten(), rtol=1e-5, atol=0)
    return None if close else "DoRA magnitude differs"


def _parts_difference(
    trained: Mapping[str, torch.Tensor], copy: Mapping[str, torch.Tensor], tolerance: float
) -> str | None:
    """As `difference`, tensor by tensor, for methods whose delta W depends on the base's weight."""
    if {name: tensor.shape for name, tensor in trained.items()} != {name: t.shape for name, t in copy.items()}:
        return Message(
            "its tensors are {names}, expected {others}", ", ".join(sorted(copy)) or "none", ", ".join(sorted(trained))
        )
    for name, tensor in trained.items():
        error, size = (float(torch.linalg.vector_norm(t.float())) for t in (copy[name] - tensor, tensor))
        if not error <= tolerance * size:
            return Message("{name} is off by {value:.3g} %", name, 100 * error / max(size, 1e-30))
    return None


def _shape(layer: AnyLayer) -> tuple[int, ...]:
    """The weight's shape, as far as the layer has it: LoHa and LoKr include a convolution's kernel in the columns."""
    return (layer.up.shape[0], *layer.down.shape[1:]) if isinstance(layer, LoraLayer) else layer.size


def _norm(layers: Sequence[AnyLayer], signs: Sequence[int] = (1,)) -> float:
    """Frobenius norm of the sum of delta W. For LoRA no delta W is computed: |A B| = |R_a R_b^T| of the QR
    decompositions."""
    lora_layers = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if len(lora_layers) < len(layers):
        total = sum(sign * layer.delta().flatten(1) for sign, layer in zip(signs, layers, strict=True))
        return float(torch.linalg.vector_norm(torch.as_tensor(total), dtype=torch.float64))
    up = torch.cat(
        [layer.up.double().flatten(1) * layer.scale * sign for sign, layer in zip(signs, lora_layers, strict=True)],
        dim=1,
    )
    down = torch.cat([layer.down.double().flatten(1) for layer in lora_layers])
    left, right = (torch.linalg.qr(thin, mode="r").R for thin in (up, down.T))
    return float(torch.linalg.vector_norm(left @ right.T))


def verify_effect(
    original: Mapping[str, torch.Tensor],
    memory: Mapping[str, torch.Tensor],
    reloaded: Mapping[str, torch.Tensor],
    *,
    tolerance: float = 0.02,
    floor: float = 1e-5,
    no_effect: float = NO_EFFECT,
) -> list[Finding]:
    """Compare outputs of each adapted component: without the adapter, as trained, and from the file in a new model.

    Args:
        original, memory, reloaded: component ("unet", "text_encoder", ...) -> output for the same input.
        tolerance: largest difference of `reloaded` from `memory`, relative to the adapter's effect.
        floor: largest difference from rounding in the forward pass, relative to the output.
        no_effect: smallest difference of `memory` from `original` that is more than rounding, relative to the output.
    """
    findings = []
    for part, reference in original.items():
        trained, loaded, reference = memory[part].float(), reloaded[part].float(), reference.float()
        size = float(torch.linalg.vector_norm(reference))
        effect = float(torch.linalg.vector_norm(trained - reference))
        error = float(torch.linalg.vector_norm(loaded - trained))
        if not all(bool(torch.isfinite(t).all()) for t in (reference, trained, loaded)):
            findings.append(Finding(part, "its output is not finite"))
        elif effect <= no_effect * size:
            share = 100 * effect / max(size, 1e-30)
            problem = Message("the adapter has no effect on its output: {share:.2g} % is no more than rounding", share)
            findings.append(
                Finding(part, Message("{problem}; raise optimizer.learning_rate or the number of steps", problem))
            )
        elif error > tolerance * effect + floor * size:
            share = 100 * error / effect
            findings.append(
                Finding(
                    part, Message("from the file its output is off by {share:.3g} % of the adapter's effect", share)
                )
            )
    return findings
