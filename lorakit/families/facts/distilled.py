"""Distilled models, which sample in a few steps without guidance: how to recognize them, and how to sample from them.

A scheduler or a UNet is certain evidence; metadata and names are hints. The numbers of steps are from the papers and
model cards: Turbo (arXiv 2311.17042), Lightning (2402.13929), LCM (2310.04378), Hyper-SD (2404.13686), DMD2
(2405.14867), TCD (2402.19159).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorakit.config import SampleConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.units import count
from lorakit.families.spec import EPSILON

if TYPE_CHECKING:
    from lorakit.families.describe import BaseInfo

STEPS = 30
# The guidance scale that an LCM gets as an input, instead of a second pass.
EMBEDDED_GUIDANCE = 8.0
GUIDANCE_INPUT = Message(
    "its UNet takes the guidance as an input: training gives it none, samples give it {guidance:g}", EMBEDDED_GUIDANCE
)
UNDONE = "the usual loss slowly undoes distillation: train on the model that it was distilled from, if you have it"


@dataclass(frozen=True)
class Distilled:
    """A method of distillation, and the sampling that it needs.

    Attributes:
        kind: its name.
        steps, guidance: number of steps and guidance scale of a sample.
        scheduler: diffusers' sampler; its timesteps start at the last one ("trailing").
        evidence: how the model was recognized, for messages.
    """

    kind: str
    steps: int
    guidance: float = 1.0
    scheduler: str = "EulerDiscreteScheduler"
    evidence: str = ""

    def notes(self) -> list[str]:
        """Messages for the plan."""
        line = Message(
            "distilled model ({kind}, {evidence}): samples take {steps} at guidance {guidance:g} unless sample.steps "
            "and sample.guidance are set",
            *(self.kind, self.evidence, count(self.steps, "step"), self.guidance),
        )
        return [line, *([GUIDANCE_INPUT] if self.guidance == EMBEDDED_GUIDANCE else []), UNDONE]


_LCM = "LCMScheduler"
# Pattern of a name or title -> kind. It is case-sensitive if the kind is a part of common words.
_KINDS = {
    r"(?i:lightning)": Distilled("Lightning", 4),
    r"(?i:turbo)(?!(?i:charg|fan|jet))": Distilled("Turbo", 4),
    r"(?i:hyper)(?i:[-_ ]?(sd|xl|vae|\d|lora)|(?=[-_ .]|$))(?!(?i:[-_ ]?(real|detail|photo)))": Distilled("Hyper", 8),
    r"LCM(?![A-Z])|(?<![a-z])lcm(?![a-z])": Distilled("LCM", 8, scheduler=_LCM),
    r"DMD2?(?![A-Z])|(?<![a-z])dmd2?(?![a-z])": Distilled("DMD2", 4, scheduler=_LCM),
    r"TCD(?![A-Z])|(?<![a-z])tcd(?![a-z])": Distilled("TCD", 8),
}
_BY_SCHEDULER = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}
_STEP_COUNT = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z\d])", re.IGNORECASE)
# ByteDance's one-step model predicts x0 (model card of SDXL-Lightning).
_PICTURE = re.compile(r"(?<![a-z\d])x0(?![a-z\d])|lightning[-_ ]?1[-_ ]?steps?(?![a-z\d])", re.IGNORECASE)
# Steps if only the name suggests distillation: names are no certain evidence, and merged models need more steps.
STEPS_BY_NAME = 8


def find(
    names: Iterable[str], metadata: Mapping[str, str], unet: Mapping[str, object], scheduler: Mapping[str, object]
) -> Distilled | None:
    """The method by which a model was distilled, or None.

    Args:
        names: names of its file or folder and of its repository.
        metadata: metadata of a single file.
        unet, scheduler: their configurations.
    """
    name, title = " ".join(names), " ".join(metadata.get(f"modelspec.{key}", "") for key in ("title", "architecture"))
    in_name, in_title = _kind(name), _kind(title)
    sampler = str(scheduler.get("_class_name", ""))
    trailing = sampler.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing"
    usual = scheduler.get("prediction_type", EPSILON) == EPSILON and not scheduler.get("rescale_betas_zero_snr")
    if unet.get("time_cond_proj_dim") is not None:
        return _of(name, Distilled("LCM", 4, EMBEDDED_GUIDANCE, _LCM, "as its UNet says"))
    if sampler in _BY_SCHEDULER or (trailing and usual):
        by_scheduler = next(kind for kind in _KINDS.values() if kind.kind == _BY_SCHEDULER.get(sampler, "Turbo"))
        return _of(name, replace(in_name or in_title or by_scheduler, evidence="as its scheduler says"))
    if in_title:
        return _of(f"{name} {title}", replace(in_title, evidence="as its metadata says"))
    if in_name:
        return _of(name, replace(in_name, steps=STEPS_BY_NAME, evidence="as its name says"))
    return None


def require_noise(base: str, names: Iterable[str], kind: Distilled, option: str) -> None:
    """Refuse a model whose name says that it predicts x0, unless `option` (`model.prediction_type`) is set.

    Raises:
        LorakitError: it is such a model.
    """
    if option == "auto" and kind.kind == "Lightning" and any(map(_PICTURE.search, names)):
        raise LorakitError(
            "base {name} is SDXL-Lightning's model for 1 step, as its name says, which predicts the picture "
            "(x0), as lorakit does not train: give the model for 2, 4 or 8 steps; if the name is wrong, set "
            "model.prediction_type",
            base,
        )


def _kind(text: str) -> Distilled | None:
    return next((kind for pattern, kind in _KINDS.items() if re.search(pattern, text)), None)


def _of(name: str, kind: Distilled) -> Distilled:
    """The kind, with the number of steps from the name, as in `sdxl_lightning_8step`."""
    count = _STEP_COUNT.search(name)
    return replace(kind, steps=int(count[1])) if count and int(count[1]) > 0 else kind


@dataclass(frozen=True, kw_only=True)
class Sampling(SampleConfig):
    """The section `sample` of the config with all values set."""

    steps: int = STEPS
    guidance: float = 1.0


def complete(sample: SampleConfig, info: BaseInfo) -> Sampling:
    """The section `sample` with the base's defaults for unset steps and guidance."""
    kind = info.distilled
    steps = kind.steps if kind else STEPS
    guidance = kind.guidance if kind else registry.family_of(info.family).guidance
    needs = {
        "steps": steps if sample.steps is None else sample.steps,
        "guidance": guidance if sample.guidance is None else sample.guidance,
    }
    return Sampling(**{**vars(sample), **needs})
