"""The noise schedule of a base. Unknown schedules are refused; `model.prediction_type` overrides the prediction
type."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import shorten
from lorakit.families.spec import EPSILON

_VELOCITY = re.compile(r"v[-_ ]?(pred|param)|zt?snr|zero[-_ ]?(terminal[-_ ]?)?snr|(?<![a-z])v_parameterization", re.I)
_EPSILON = re.compile(r"(?<![a-z])eps(?![a-z])|epsilon", re.IGNORECASE)
# Metadata keys with the model's name, its training or the models that it was merged from.
_TELLING = re.compile(r"modelspec\.(title|architecture|description|tags|merged_from)|sd_merge_\w+|ztsnr")
# The training schedule of every Stable Diffusion before 3.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
}


def override(scheduler: dict[str, Any], option: str) -> tuple[dict[str, Any], str]:
    """The schedule with the prediction type of `model.prediction_type`, and a message if that changes it."""
    before = scheduler.get("prediction_type", EPSILON), bool(scheduler.get("rescale_betas_zero_snr"))
    if option == "auto":
        return scheduler, ""
    zero = option.endswith("_zero_snr")
    prediction = option.removesuffix("_zero_snr")
    if (prediction, zero) == before:
        return scheduler, ""
    changed = scheduler | {"prediction_type": prediction, "rescale_betas_zero_snr": zero}
    line = "prediction type: {kind}, as model.prediction_type says; the base itself says {own}"
    return changed, Message(line, option, name(*before))


def name(prediction: str, zero_snr: bool) -> str:
    """A prediction type for messages."""
    return Message("{kind} with zero terminal SNR", prediction) if zero_snr else prediction


def check(base: Path | str, scheduler: Mapping[str, object], *, flow: bool) -> None:
    """Refuse other noise schedules: the adapter would be trained with the wrong noise."""
    name, schedule = str(scheduler.get("_class_name", "")), ""
    if name.startswith("EDM") or "sigma_data" in scheduler:
        schedule = Message("EDM's noise ({name})", name)
    elif flow != (name.startswith("FlowMatch") or bool(scheduler.get("use_flow_sigmas"))):
        schedule = f"{'diffusion' if flow else 'flow matching'} ({name})"  # names of the field in every language
    elif not flow:
        other = {key: value for key in SCHEDULE if (value := scheduler.get(key)) != SCHEDULE[key]}
        facts = ", ".join(f"{key} {shorten(str(value), 40)}" for key, value in other.items())
        schedule = Message("another noise schedule ({facts})", facts) if other else ""
    if schedule:
        raise LorakitError(
            "base {path} was trained with {schedule}, which lorakit does not do: give another base", base, schedule
        )
    if not name or name not in _schedulers():
        version = importlib.metadata.version("diffusers")
        raise LorakitError(
            "base {path} names a scheduler {name!r} that diffusers {version} lacks: upgrade diffusers",
            *(base, name, version),
        )


@functools.cache
def _schedulers() -> set[str]:
    """The names of diffusers' schedulers, read from its source: importing diffusers would import torch."""
    spec = importlib.util.find_spec("diffusers")
    text = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    return set(re.findall(r'"(\w*Scheduler\w*)"', text))


def velocity_hint(names: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Evidence for v-prediction in a base whose configuration does not state it, or ""."""
    if any(_VELOCITY.search(name) and not _EPSILON.search(name) for name in names):
        return "its name"
    if metadata.get("ss_v_parameterization") == "True" or metadata.get("ss_zero_terminal_snr") == "True":
        return "its metadata"
    telling = [text for key, text in metadata.items() if _TELLING.fullmatch(key)]
    return "its metadata" if any(_VELOCITY.search(text) for text in telling) else ""


def velocity_warning(base: str, names: tuple[str, ...], metadata: Mapping[str, str]) -> list[str]:
    """The warning for a base that is used with epsilon prediction although there is evidence for v-prediction."""
    evidence = velocity_hint(names, metadata)
    line = Message(
        "base {name} is trained as one that predicts epsilon, but {evidence} mentions v-prediction: "
        "measure it with `lorakit probe {base}`, and set model.prediction_type",
        *(names[0], evidence, base),
    )
    return [line] if evidence else []
