"""Tests that distilled bases are recognized by configuration, metadata or name, reported, and drawn with few steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from PIL import Image

from lorakit import families
from lorakit.config import Config, ModelConfig, SampleConfig, load
from lorakit.core.errors import LorakitError
from lorakit.families.facts import distilled
from lorakit.inference import sampling
from lorakit.runs.preflight import preflight
from lorakit.ui import texts

LEADING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
NAMES = {
    "sd_xl_turbo_1.0_fp16": ("Turbo", 8),
    "DreamShaperXL_Turbo_v2_1": ("Turbo", 8),
    "sdxl_lightning_4step": ("Lightning", 4),
    "SDXL-Lightning-8steps": ("Lightning", 8),
    "juggernautXL_v9Rdphoto2Lightning": ("Lightning", 8),
    "Hyper-SDXL-1step-lora": ("Hyper", 1),
    "realisticVisionV60B1_v51HyperVAE": ("Hyper", 8),
    "epicrealismXL_vxiAbeast4SHyper": ("Hyper", 8),
    "LCM_Dreamshaper_v7": ("LCM", 8),
    "dreamshaper_8LCM": ("LCM", 8),
    "photonLCM_v10": ("LCM", 8),
    "lcm-sdxl": ("LCM", 8),
    "bigasp_DMD2": ("DMD2", 8),
    "dmd2_sdxl_4step_unet": ("DMD2", 4),
    "hyper-sd15-tcd": ("Hyper", 8),
    "mySdxl_TCD": ("TCD", 8),
}
NAMES |= {"x_lightning_v1_step4": ("Lightning", 8), "Juggernaut-Lightning_4S_1-4steps": ("Lightning", 4)}
PLAIN = [
    "hyperrealism_v3", "Hyper_Realism_1.2", "HyperDetail", "v1-5-pruned", "sd_xl_base_1.0", "calcmix", "hypernetwork",
    "step4", "noobai-XL", "turbocharged_v2",
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "steps"), [(name, *values) for name, values in NAMES.items()])
def test_a_distilled_base_is_recognized_by_its_name(name: str, kind: str, steps: int) -> None:
    actual = distilled.find([name], {}, {}, LEADING)
    assert actual is not None and (actual.kind, actual.steps, actual.guidance) == (kind, steps, 1.0)
    assert actual.evidence == "as its name says"


@pytest.mark.parametrize("name", PLAIN)
def test_other_names_are_not_distilled(name: str) -> None:
    assert distilled.find([name], {"modelspec.title": name}, {}, LEADING) is None


@pytest.mark.parametrize(
    ("name", "unet", "scheduler", "kind", "steps", "guidance"),
    [
        ("x", {}, {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, "Turbo", 4, 1),
        (
            "x-lightning",
            {},
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
            "Lightning",
            4,
            1,
        ),
        ("x", {}, {"_class_name": "LCMScheduler"}, "LCM", 8, 1),
        ("x", {}, {"_class_name": "TCDScheduler"}, "TCD", 8, 1),
        ("x-2step", {"time_cond_proj_dim": 256}, {"_class_name": "LCMScheduler"}, "LCM", 2, 8),
    ],
)
def test_a_distilled_base_is_recognized_by_its_configuration(
    name: str, unet: dict[str, Any], scheduler: dict[str, Any], kind: str, steps: int, guidance: float
) -> None:
    actual = distilled.find([name], {}, unet, scheduler)
    assert actual is not None and (actual.kind, actual.steps, actual.guidance) == (kind, steps, guidance)
    assert actual.evidence in ("as its scheduler says", "as its UNet says")


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
        {"_class_name": "PNDMScheduler"},
    ],
)
def test_other_schedulers_are_not_distilled(scheduler: dict[str, Any]) -> None:
    """Zero terminal SNR alone does not mark a distilled base; trailing timesteps are needed too."""
    assert distilled.find(["x"], {}, {}, scheduler) is None


def with_scheduler(base: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(base, target)
    path = target / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def settings(base: Path, photos: Path, **changes: Any) -> Config:
    photos.mkdir(exist_ok=True)
    Image.effect_noise((64, 64), 60).convert("RGB").save(photos / "a.png")
    arguments = {"model.base": str(base), "data.folder": str(photos), "data.name": "sks toy", "data.resolution": 64}
    return load(
        None, arguments | {"train.steps": 1} | {name.replace("__", "."): value for name, value in changes.items()}
    )


def test_the_plan_reports_a_distilled_base_and_few_sample_steps(tiny_sd1: Path, tmp_path: Path) -> None:
    base = with_scheduler(tiny_sd1, tmp_path / "x", _class_name="EulerDiscreteScheduler", timestep_spacing="trailing")
    ready = preflight(settings(base, tmp_path / "photos"))
    line = "distilled model (Turbo, as its scheduler says): samples take 4 steps at guidance 1"
    assert any(text.startswith(line) for text in ready.lines()) and distilled.UNDONE in ready.lines()
    assert all(texts.sentences("zh-Hant").translated(line) for line in ready.info.notes)
    plain = preflight(settings(tiny_sd1, tmp_path / "photos"))
    assert not any("distilled" in text for text in plain.lines())
    for config, steps, guidance in [(SampleConfig(), 4, 1.0), (SampleConfig(steps=9, guidance=3.0), 9, 3.0)]:
        process = distilled.complete(config, ready.info)
        assert (process.steps, process.guidance) == (steps, guidance)
    assert distilled.complete(SampleConfig(), plain.info).guidance == 7.5


def test_a_distilled_single_file_is_recognized_by_metadata_or_name(tmp_path: Path) -> None:
    pipeline = small_models.small("sdxl", tmp_path / "sdxl")
    titles = {"modelspec.title": "SDXL Lightning 2step"}
    small_models.write(tmp_path / "a.safetensors", "sdxl", pipeline, metadata=titles)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "hyper.safetensors")
    info = families.describe(ModelConfig(base=str(tmp_path / "a.safetensors"), tokenizer=str(tmp_path / "sdxl")))
    assert info.distilled is not None and (info.distilled.kind, info.distilled.steps) == ("Lightning", 2)
    assert distilled.complete(SampleConfig(guidance=2.0), info).guidance == 2.0
    plain = families.describe(tmp_path / "sdxl")
    assert plain.distilled is None and distilled.complete(SampleConfig(), plain).guidance == 6.0


@pytest.mark.parametrize(
    ("changes", "scheduler", "title"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, EulerDiscreteScheduler, "Euler"),
        ({"_class_name": "LCMScheduler"}, LCMScheduler, "LCM"),
    ],
)
def test_samples_of_a_distilled_base_use_its_sampler(
    changes: dict[str, Any], scheduler: type, title: str, sd1: Any, tmp_path: Path
) -> None:
    """Samples use the base's own sampler, and a picture depends on its seed alone."""
    base = with_scheduler(sd1.info.path, tmp_path / "base", **changes)
    family = families.load(families.describe(base), "cpu", torch.float32)
    kind = family.info.distilled
    state = torch.get_rng_state()
    first, second = sampling.draw(family, ["a toy", "a toy"], SampleConfig(seed=5), 64)
    assert torch.equal(state, torch.get_rng_state())
    (alone,) = sampling.draw(family, ["a toy"], SampleConfig(seed=6), 64)
    assert np.array_equal(np.asarray(second), np.asarray(alone)) and first.tobytes() != second.tobytes()
    assert (
        f"Steps: {kind.steps}, Sampler: {title}, Schedule type: SGM Uniform, CFG scale: 1," in first.info["parameters"]
    )
    pipeline, _ = sampling.sampling_pipeline(family, 60)
    assert isinstance(pipeline.scheduler, scheduler)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps[0] == 999
    pipeline.scheduler.set_timesteps(60)  # a user may set this many steps


def test_an_lcm_folder_is_described(tiny_sd1: Path, tmp_path: Path) -> None:
    """SimianLuo/LCM_Dreamshaper_v7 has this form: another pipeline class with the same parts."""
    base = with_scheduler(tiny_sd1, tmp_path / "base", _class_name="LCMScheduler")
    index = json.loads((base / "model_index.json").read_text()) | {"_class_name": "LatentConsistencyModelPipeline"}
    (base / "model_index.json").write_text(json.dumps(index))
    info = families.describe(base)
    assert info.family == "sd1" and info.distilled is not None and info.distilled.kind == "LCM"
    index["_class_name"] = "LatentSomethingPipeline"
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(LorakitError, match="is a LatentSomethingPipeline"):
        families.describe(base)


def test_a_base_that_may_predict_v_gives_a_warning(tiny_sd1: Path, tiny_sd1_v: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_sd1, tmp_path / "noob-vpred")
    (warning,) = preflight(settings(base, tmp_path / "photos")).info.warnings
    assert warning.endswith(f"measure it with `lorakit probe {base}`, and set model.prediction_type")
    assert warning in preflight(settings(base, tmp_path / "photos")).warnings
    assert texts.sentences("zh-Hant").translated(warning)
    for sure in ("epsilon", "v_prediction"):
        changed = settings(base, tmp_path / "photos", model__prediction_type=sure)
        assert not preflight(changed).info.warnings
    assert not families.describe(shutil.copytree(tiny_sd1_v, tmp_path / "vpred")).warnings


def test_a_model_that_predicts_the_picture_is_refused() -> None:
    for name in ("sdxl_lightning_1step_x0", "SDXL-Lightning 1 step", "lightning_unet_x0"):
        kind = distilled.find([name], {}, {}, LEADING)
        assert kind is not None
        with pytest.raises(LorakitError, match="which predicts the picture") as caught:
            distilled.require_noise(name, [name], kind, "auto")
        assert texts.sentences("zh-Hant").translated(str(caught.value))
        distilled.require_noise(name, [name], kind, "epsilon")
    for name in ("sdxl_lightning_2step", "lightning_mix01_v1_step4", "lightning_v1_10steps"):
        kind = distilled.find([name], {}, {}, LEADING)
        assert kind is not None
        distilled.require_noise(name, [name], kind, "auto")


def test_a_unet_with_guidance_input_is_reported() -> None:
    kind = distilled.find(["x-1step"], {}, {"time_cond_proj_dim": 256}, LEADING)
    assert kind is not None and distilled.GUIDANCE_INPUT in kind.notes()
    assert kind.notes()[0].startswith("distilled model (LCM, as its UNet says): samples take 1 step at guidance 8")
    assert all(texts.sentences("zh-Hant").translated(line) for line in kind.notes())
