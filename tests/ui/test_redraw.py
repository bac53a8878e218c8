"""The compare page draws prompts again with the settings of their pictures."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the front end is an extra")

from lorakit.config import SampleConfig, sample_prompts
from lorakit.core import image_grid
from lorakit.inference.recipe import picture_info
from lorakit.runs.run_folder import RunFolder
from lorakit.ui.pages import compare


def test_the_compare_page_offers_prompts_with_their_settings(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (run.samples / "step-000002").mkdir(parents=True)
    info: Any = SimpleNamespace(
        distilled=None, clip_skip=0, spec=SimpleNamespace(clip_skip=0), title="base", hash="0123", prediction_type=""
    )
    own = SampleConfig(steps=4, guidance=2.0, negative_prompt="blue")
    picture = Image.fromarray(np.zeros((64, 128, 3), dtype=np.uint8))
    picture.info.update(picture_info(info, "DDIM", "a toy", 7, own, (128, 64), "x", 1.0))
    image_grid.save(picture, run.samples / "step-000002" / "01.png")
    (recipe,) = compare._recipes(run, 2)
    assert sample_prompts.from_recipe(recipe) == "a toy --w 128 --h 64 --d 7 --s 4 --l 2.0 --n blue"
