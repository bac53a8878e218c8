"""Tests that measure a base's prediction type: the bundled base predicts v, and a copy is made to predict epsilon."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lorakit import families
from lorakit.cli import main as cli
from lorakit.core.errors import LorakitError
from lorakit.families.facts import noise_schedule
from lorakit.families.pocket import subjects
from lorakit.inference.measure_prediction import Verdict, measure

PHOTOS = [image for image, _ in subjects.photos("zib", 2)]


@pytest.fixture(scope="module")
def pocket() -> Any:
    return families.load(families.describe("pocket"), "cpu", torch.float32)


def test_v_prediction_and_epsilon_are_distinguished(pocket: Any) -> None:
    """The copy returns the noise that follows from the base's v-prediction."""
    verdict = measure(pocket, PHOTOS)
    assert verdict.prediction_type == verdict.current == "v_prediction"
    assert verdict.v_prediction < 0.4 < 0.9 < verdict.epsilon
    alphas = pocket.prediction.alphas_cumprod

    def to_noise(module: Any, inputs: Any, answer: Any) -> Any:
        alpha = alphas[inputs[1]].reshape(-1, 1, 1, 1)
        return (alpha.sqrt() * answer[0] + (1 - alpha).sqrt() * inputs[0],)

    hook = pocket.denoiser.register_forward_hook(to_noise)
    try:
        twin = measure(pocket, PHOTOS)
    finally:
        hook.remove()
    assert twin.prediction_type == "epsilon" and twin.epsilon < 0.2 and twin.v_prediction > 1.0
    assert "lorakit reads it as v_prediction: set model.prediction_type = 'epsilon'" in twin.lines()[-1]
    assert torch.equal(
        torch.tensor(dataclasses.astuple(measure(pocket, PHOTOS))[:2]),
        torch.tensor([verdict.epsilon, verdict.v_prediction]),
    )


def test_the_command_reports_the_right_prediction_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PHOTOS[0].save(tmp_path / "a.png")
    arguments = ["probe", "pocket", "--photo", str(tmp_path / "a.png"), "--set", "memory.device=cpu"]
    assert cli.main([*arguments, "--set", "model.prediction_type=epsilon"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "base: pocket (sd1), 1 photo" and len(lines) == 4
    assert "it predicts v_prediction, and lorakit reads it as epsilon: set model.prediction_type = 'v_" in lines[-1]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction_type"] == "v_prediction"


def test_random_weights_and_other_families_give_no_result(sd1: Any, tmp_path: Path) -> None:
    verdict = measure(sd1, [Image.new("RGB", (80, 64), "teal")])
    assert verdict.prediction_type == "" and "neither is clearly right" in verdict.lines()[-1]
    flow = SimpleNamespace(info=dataclasses.replace(sd1.info, loader="sd3"))
    with pytest.raises(LorakitError, match="predicts the flow, as every model of its family"):
        measure(flow, PHOTOS)
    assert cli.main(["probe", "pocket", "--photo", str(tmp_path / "gone.png")]) == 1


def test_a_base_that_predicts_nan_is_refused(pocket: Any) -> None:
    hook = pocket.denoiser.register_forward_hook(lambda module, inputs, answer: (answer[0] * float("nan"),))
    try:
        with pytest.raises(LorakitError, match="answers with NaN or infinity"):
            measure(pocket, PHOTOS)
    finally:
        hook.remove()


def test_zero_terminal_snr_is_reported_for_v_prediction() -> None:
    line = Verdict(1.5, 0.1, "v_prediction", "epsilon").lines()[-1]
    assert line.endswith("or 'v_prediction_zero_snr' where the model's page speaks of zero terminal SNR")


@pytest.mark.parametrize(
    ("name", "metadata", "evidence"),
    [
        ("noobaiXLNAIXL_vPred10Version", {}, "its name"),
        ("NoobAI-XL-Vpred-v1.0", {}, "its name"),
        ("wd-1-5-v_prediction", {}, "its name"),
        ("merge_ztsnr", {}, "its name"),
        ("noobaiXLNAIXL_epsilonPred11Version", {}, ""),
        ("sdxl-eps-no-vpred", {}, ""),
        ("v1-5-pruned", {}, ""),
        ("improved", {}, ""),
        ("merge", {"modelspec.title": "Noob v-pred"}, "its metadata"),
        ("merge", {"sd_merge_models": '{"ab": {"name": "NoobAI-XL-Vpred.safetensors"}}'}, "its metadata"),
        ("merge", {"ss_v_parameterization": "True"}, "its metadata"),
        ("merge", {"ss_v_parameterization": "False", "modelspec.author": "vpred"}, ""),
        ("merge", {"ztsnr": "v_pred"}, "its metadata"),
    ],
)
def test_names_and_metadata_indicate_v_prediction(name: str, metadata: dict[str, str], evidence: str) -> None:
    assert noise_schedule.velocity_hint([name], metadata) == evidence
