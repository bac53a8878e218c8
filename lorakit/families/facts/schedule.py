"""The noise schedule that a base says it was trained on: others are refused; `model.prediction_type` changes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.core.errors import LorakitError
from lorakit.families.spec import EPSILON

# What every Stable Diffusion before 3 was trained on.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
}


def override(scheduler: dict[str, Any], option: str) -> tuple[dict[str, Any], str]:
    """The schedule with the prediction type that `model.prediction_type` asks for, and a line where that changes it."""
    before = scheduler.get("prediction_type", EPSILON), bool(scheduler.get("rescale_betas_zero_snr"))
    if option == "auto":
        return scheduler, ""
    zero = option.endswith("_zero_snr")
    prediction = option.removesuffix("_zero_snr")
    if (prediction, zero) == before:
        return scheduler, ""
    changed = scheduler | {"prediction_type": prediction, "rescale_betas_zero_snr": zero}
    original = f"{before[0]}{' with zero terminal SNR' if before[1] else ''}"
    return changed, f"prediction type: {option}, as model.prediction_type says; the base itself says {original}"


def check(base: Path | str, scheduler: Mapping[str, object], *, flow: bool) -> None:
    """Refuse the noise schedule of another kind of model: an adapter trained on ours would not fit it."""
    name, schedule = str(scheduler.get("_class_name", "")), ""
    if name.startswith("EDM") or "sigma_data" in scheduler:
        schedule = f"EDM's noise ({name})"
    elif flow != (name.startswith("FlowMatch") or bool(scheduler.get("use_flow_sigmas"))):
        schedule = f"{'diffusion' if flow else 'flow matching'} ({name})"
    elif not flow:
        other = {key: value for key in SCHEDULE if (value := scheduler.get(key)) != SCHEDULE[key]}
        schedule = f"another noise schedule ({', '.join(f'{k} {v}' for k, v in other.items())})" if other else ""
    if schedule:
        raise LorakitError(f"base {base} was trained with {schedule}, which lorakit does not do: give another base")
