"""The files that the pages offer as adapters, and what they say about adapters for the bundled base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

gr = pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")

from lorakit.formats.inspect import Report  # noqa: E402
from lorakit.ui import texts  # noqa: E402
from lorakit.ui.pages.adapter import report_card  # noqa: E402
from lorakit.ui.workspace import Workspace  # noqa: E402


def test_the_pages_list_adapters_without_models(tmp_path: Path) -> None:
    workspace, run = Workspace(tmp_path, []), tmp_path / "run"
    run.mkdir()
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{layer}.lora_down.weight": torch.ones(2, 4, 1, 1), f"{layer}.lora_up.weight": torch.ones(4, 2, 1, 1)}
    for name in ("toy", "small-model"):  # the second name is an adapter of a subject "small-model"
        save_file(lora, run / f"{name}.safetensors")
    save_file({"model.diffusion_model.out.2.weight": torch.ones(4, 4, 3, 3)}, run / "toy-model.safetensors")
    (run / "broken-model.safetensors").write_bytes(b"no")
    assert {path.name for path in workspace.adapters()} == {"toy.safetensors", "small-model.safetensors"}


def test_an_adapter_for_the_bundled_base_is_not_called_one_for_stable_diffusion() -> None:
    only = "lorakit's bundled base"
    report = Report("toy.safetensors", "adapter", "an adapter", 9, "sd1", "metadata", only)
    assert "lorakit&#x27;s bundled base" in report_card(report, texts.sayer("en"))
    assert ">sd1<" not in report_card(report, texts.sayer("en"))
    assert "lorakit 內附的基礎模型" in report_card(report, texts.sayer("zh-Hant"))
