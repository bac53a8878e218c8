"""The last part of every run: check that the exported file does what the model in memory does.

Every exported file is checked in three ways:

1. Its tensors are read again: every layer must be in the file, finite, not zero and as trained.
2. diffusers' loader, which shares no code with the exporter, loads it into a new base: each delta W must equal the
trained one.
3. UNet and text encoder compute fixed inputs (the probe) three times: in the trained model, in the base, and in a new
base with the file. The third output must equal the first and differ from the second.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from lorakit import adapters, formats
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.core import rng
from lorakit.core.layer_names import canonical
from lorakit.core.messages import Message, join, some
from lorakit.engine import device as devices
from lorakit.formats import compatibility, embeddings, verify

if TYPE_CHECKING:
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning

RIGHT = (
    "the file reproduces the trained adapter: effect {effect:.2%} of the base's output, difference {error:.2%} of the "
    "effect"
)
# Largest difference between file and model in memory, relative to the adapter's effect: its factors are rounded to
# float16 or bfloat16, and sums run in another order.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
# Largest effect of rounding on the output of a forward pass in the base's precision, relative to the output.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# An effect up to this share of the output counts as none: it is rounding, or too small to matter.
NO_EFFECT = {torch.float32: 5e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# Largest relative error of factors that diffusers casts to the base's precision.
CAST = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Finding:
    """The result of one check: its name, whether it passed, and the measured value or the cause."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Probe:
    """Outputs for fixed inputs, float32 on the CPU: the UNet's prediction and the text embeddings that it received."""

    prediction: torch.Tensor
    embeddings: torch.Tensor


def probe(family: Family, prompt: str, size: tuple[int, int], condition: Conditioning | None = None) -> Probe:
    """Run text encoder and UNet once at a middle timestep, each alone on the device.

    Args:
        size: (width, height) in pixels.
        condition: embeddings of the prompt, if already computed.
    """
    width, height = (side // family.info.downscale for side in size)
    shape = (1, family.info.latent_channels, height, width)
    noisy = torch.randn(shape, generator=rng.generator(0, 0, "self-check")).to(family.device)
    timesteps = family.prediction.timesteps_at(torch.full((1,), 0.5, device=family.device))
    with torch.no_grad():
        if condition is None:
            family.release("unet")
            condition = family.encode_text([prompt])
        family.release("text_encoders")
        condition = condition.with_sizes(family.size_conditions(size[::-1], (0, 0), size[::-1]))
        prediction = family.predict(noisy, timesteps, condition)
    return Probe(prediction.float().cpu(), condition["encoder_hidden_states"].float().cpu())


def examine(
    exports: Mapping[str, Path],
    weights: AdapterWeights,
    base_probe: Probe,
    memory_probe: Probe,
    *,
    load: Callable[[], Family],
    prompt: str,
    size: tuple[int, int],
    dtype: str,
    untrained_layers: Collection[str] = (),
) -> Iterator[tuple[str, list[Finding], Family | None]]:
    """Check each exported file in its own, newly loaded base: yield (format, findings, base with the file in it).

    The base is None if the file failed the first check.

    Args:
        exports: format -> file or folder.
        weights: the adapter in memory.
        base_probe, memory_probe: outputs of the base and of the trained model.
        load: loads the base again.
        prompt, size: the same as for the probes.
        dtype: the precision of the files.
        untrained_layers: layers that get no gradient. They are in the file and may be zero.
    """
    announced = [layer for layer in weights.layers if layer not in untrained_layers]
    for name, path in exports.items():
        findings = file_findings(name, path, weights, announced)
        if failures(findings):
            yield name, findings, None
            continue
        gc.collect()  # the caller's old blocks are in reference cycles
        family = load()
        # diffusers' loader cannot read DoRA in the web UIs' axis, the LyCORIS methods or a PEFT folder.
        only_lora = all(layer.is_lora for layer in weights.layers.values())
        if not weights.layers:
            findings.append(read_word_by_diffusers(name, path, family, weights))
        elif only_lora and compatibility.has_rule("diffusers", name, path, family.info.family):
            findings.append(read_by_diffusers(name, path, family, weights, TOLERANCE[dtype] / 4))
        adapters.apply(family, formats.read(path, embedding=not weights.layers))
        read = probe(family, prompt, size)
        findings += compare(
            name,
            base_probe,
            memory_probe,
            read,
            tolerance=TOLERANCE[dtype],
            # Products in TF32 have the mantissa of float16.
            dtype=torch.float16 if devices.uses_tf32(family.device, family.dtype) else family.dtype,
            weights=weights,
        )
        yield name, findings, family
        del family  # free its memory for the next one


def file_findings(name: str, path: Path, weights: AdapterWeights, announced: Sequence[str]) -> list[Finding]:
    """Read the exported file again: every announced layer must be in it, finite, not zero and as trained."""
    wrong = verify.verify_file(path, weights, announced)
    if not weights.layers:
        count = sum(len(rows) for vectors in weights.embeddings.values() for rows in vectors.values())
        right = Message("vectors: {count} present, finite and as trained", count)
        return [Finding(Message("{format} file", name), not wrong, some(map(str, wrong), 3, "; ") if wrong else right)]
    if not wrong:
        text = "modules present, finite and not zero: {some} of {count}"
        return [Finding(Message("{format} file", name), True, Message(text, len(announced), len(announced)))]
    zero = sum(finding.problem.startswith("zero") for finding in wrong)
    if zero == len(announced):
        return [
            Finding(
                Message("{format} file", name),
                False,
                "the adapter has no effect: every module is zero; was the learning rate 0?",
            )
        ]
    return [Finding(Message("{format} file", name), False, some(map(str, wrong), 3, "; "))]


def read_by_diffusers(name: str, path: Path, family: Family, weights: AdapterWeights, tolerance: float) -> Finding:
    """Load the file with `load_lora_weights`, compare every layer in the base with the trained one, and unload it."""
    pipeline = family.pipeline()
    with _quiet():
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="selfcheck")
    layers = {
        canonical(component, place): layer
        for component, module in family.modules().items()
        for place, layer in module.named_modules()
        if "selfcheck" in getattr(layer, "lora_A", {})
    }
    wrong: list[str] = [Message("{layer}: not applied", layer) for layer in weights.layers if layer not in layers]
    for layer in weights.layers.keys() & layers.keys():
        applied = layers[layer]
        down, up = (factors["selfcheck"].weight.detach() for factors in (applied.lora_A, applied.lora_B))
        file_layer = LoraLayer(down.float().cpu(), up.float().cpu(), applied.scaling["selfcheck"] * len(down))
        problem = verify.difference(weights.layers[layer], file_layer, tolerance + CAST[family.dtype])
        # A layer that is zero in memory (it gets no gradient) may be zero here.
        if problem and torch.count_nonzero(weights.layers[layer].delta()):
            wrong.append(Message("{layer}: {problem}", layer, problem))
    pipeline.unload_lora_weights()
    count = len(weights.layers)
    right = Message("modules applied, each as trained: {some} of {count}", count, count)
    return Finding(Message("{format} in diffusers", name), not wrong, some(wrong, 3, "; ") if wrong else right)


def read_word_by_diffusers(name: str, path: Path, family: Family, weights: AdapterWeights) -> Finding:
    """Load the file with `load_textual_inversion`, compare the vectors in each text encoder with the trained ones, and
    unload it."""
    pipeline, wrong = family.pipeline(), list[str]()
    word, vectors = next(iter(weights.embeddings.items()))
    file = load_file(path)
    for encoder in family.info.spec.text_encoders:
        if encoder.name not in vectors:
            continue
        model, tokenizer = (pipeline.components[part] for part in (encoder.name, encoder.tokenizer))
        token, key = f"<{word}>", embeddings.tensor_name(vectors, encoder.name)
        pipeline.load_textual_inversion({key: file[key]}, token=token, text_encoder=model, tokenizer=tokenizer)
        ids = tokenizer(pipeline.maybe_convert_prompt(token, tokenizer), add_special_tokens=False).input_ids
        rows = model.get_input_embeddings().weight.detach()[ids].float().cpu()
        if not torch.allclose(rows, vectors[encoder.name], rtol=CAST[family.dtype], atol=CAST[family.dtype]):
            wrong.append(Message("{encoder}: its vectors are not those that were trained", encoder.name))
        tokens = [token, *(f"{token}_{number}" for number in range(1, len(ids)))]  # diffusers' names of further vectors
        pipeline.unload_textual_inversion(tokens=tokens, tokenizer=tokenizer, text_encoder=model)
    right = Message("text encoders that have the word as trained: {count}", len(vectors))
    return Finding(Message("{format} in diffusers", name), not wrong, some(wrong, 3, "; ") if wrong else right)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers' warning that a file has no text-encoder part."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def compare(
    name: str,
    base_probe: Probe,
    memory_probe: Probe,
    file_probe: Probe,
    *,
    tolerance: float,
    dtype: torch.dtype,
    weights: AdapterWeights,
) -> list[Finding]:
    """Findings for each adapted component, from the probes of the base, of the model in memory and of the file."""
    outputs = {"unet": (base_probe.prediction, memory_probe.prediction, file_probe.prediction)}
    if weights.embeddings or any(not layer.startswith("unet.") for layer in weights.layers):
        outputs["text encoder"] = (base_probe.embeddings, memory_probe.embeddings, file_probe.embeddings)
    findings = []
    for part, (before, trained, read) in outputs.items():
        bounds = {"tolerance": tolerance, "floor": ROUNDING[dtype], "no_effect": NO_EFFECT[dtype]}
        wrong = verify.verify_effect({part: before}, {part: trained}, {part: read}, **bounds)
        effect = (trained - before).norm() / before.norm()
        error = (read - trained).norm() / (trained - before).norm().clamp_min(1e-30)
        right = Message(RIGHT, effect, error)
        detail = join("; ", [finding.problem for finding in wrong]) if wrong else right
        title = "{format} unet" if part == "unet" else "{format} text encoder"
        findings.append(Finding(Message(title, name), not wrong, detail))
    return findings


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that did not pass."""
    return [finding for finding in findings if not finding.passed]
