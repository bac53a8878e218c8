"""The end of every run: does the file on disk do what the model in memory does?

The probe is one UNet and one text-encoder forward on fixed inputs. It is taken three times: of the trained model in
memory, of a base loaded anew, and of that base with the exported file in it. Only where the last equals the first, and
differs from the second, was an adapter made that works.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import adapters, export, families, randomness

# How far the file may be from the model in memory, as a share of the adapter's own effect: rounding of its factors to
# float16 or bfloat16, and the order of additions.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
# An effect below this share of the output is rounding, not learning.
SMALLEST_EFFECT = 1e-5


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what, whether it held, and the figure or the cause."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Probe:
    """Outputs on fixed inputs, float32 on the CPU: the UNet's prediction, and the text embeddings behind it."""

    prediction: torch.Tensor
    embeddings: torch.Tensor


def probe(family: Any, prompt: str, size: tuple[int, int]) -> Probe:
    """One forward of text encoder and UNet at a middle timestep; `size` is (width, height) in pixels."""
    width, height = (side // family.info.downscale for side in size)
    shape = (1, family.info.latent_channels, height, width)
    noisy = torch.randn(shape, generator=randomness.generator(0, 0, "self-check")).to(family.device)
    timesteps = torch.full((1,), len(family.alphas_cumprod) // 2, device=family.device, dtype=torch.int64)
    with torch.no_grad():
        condition = family.encode_text([prompt])
        ids = family.time_ids(size[::-1], (0, 0), size[::-1])
        if ids is not None:
            condition = condition.with_sizes(torch.tensor([ids], device=family.device))
        prediction = family.predict(noisy, timesteps, condition)
    return Probe(prediction.float().cpu(), condition.encoder_hidden_states.float().cpu())


def fresh(info: Any, device: Any, dtype: Any) -> Any:
    """The base, loaded anew from where it lies."""
    return families.load(info, device, dtype)


def load_file(family: Any, path: Path, method: str) -> None:
    """Put an exported file into a freshly loaded base.

    Plain and rank-stabilised LoRA go through diffusers' own loader, a reader that shares no code with the exporter.
    DoRA in the web UIs' axis and PEFT folders are not read by it and go through `export.read`.
    """
    if method == "dora" or path.is_dir():
        adapters.apply(family, export.read(path))
        return
    family.pipeline().load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lorakit")


def compare(base: Probe, memory: Probe, file: Probe, *, dtype: str, trains_text: bool) -> list[Finding]:
    """Findings from the three probes."""
    findings = []
    parts = [("unet", base.prediction, memory.prediction, file.prediction)]
    if trains_text:
        parts.append(("text encoder", base.embeddings, memory.embeddings, file.embeddings))
    for name, before, trained, read in parts:
        size = before.norm().item()
        effect = (trained - before).norm().item() / size
        read_effect = (read - before).norm().item() / size
        findings.append(
            Finding(
                f"{name} effect",
                min(effect, read_effect) >= SMALLEST_EFFECT,
                f"the adapter changes the output by {effect:.2%}"
                if min(effect, read_effect) >= SMALLEST_EFFECT
                else f"the adapter has no effect ({min(effect, read_effect):.1e} of the output)",
            )
        )
        error = (read - trained).norm().item() / size
        share = error / max(effect, SMALLEST_EFFECT)
        findings.append(
            Finding(
                f"{name} as trained",
                share <= TOLERANCE[dtype] and bool(torch.isfinite(read).all()),
                f"file and model in memory differ by {share:.2%} of the effect (allowed {TOLERANCE[dtype]:.1%})",
            )
        )
    return findings


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Those that did not hold."""
    return [finding for finding in findings if not finding.passed]
