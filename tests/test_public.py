"""The public names of `import lorakit`, for notebooks, plug-ins and other programs."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_run import noise, run_config

import lorakit

END = {"sample__prompts": (), "train__prior": "none", "train__validate_at_end": True, "sample__at_end": True}
README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("photos"), 2)


@pytest.fixture(scope="module")
def trained(
    short_validation: None, tiny_sd1: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> lorakit.Result:
    return lorakit.train(run_config(tiny_sd1, photos, tmp_path_factory.mktemp("run") / "run", 2, **END))


def test_every_name_is_a_class_or_a_function_and_none_is_a_module() -> None:
    for name in lorakit.__all__:
        value = getattr(lorakit, name)
        assert isinstance(value, (type, types.FunctionType)), name
    assert set(lorakit.__all__) <= set(dir(lorakit))
    with pytest.raises(AttributeError, match="module 'lorakit' has no attribute 'nothing'"):
        _ = lorakit.nothing


def test_config_events_and_errors_load_without_torch() -> None:
    """A host program can import lorakit, load a config and check photos without the import of torch."""
    code = (
        "import sys, lorakit; lorakit.Config, lorakit.load_config(), lorakit.Event, lorakit.LorakitError, "
        "lorakit.ConfigError, lorakit.Stopped, lorakit.preflight; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_train_stays_a_function_after_a_run(trained, tiny_sd1, photos, tmp_path) -> None:
    """Importing the package `training` must not replace the function by a module."""
    events: list[lorakit.Event] = []
    config = run_config(tiny_sd1, photos, tmp_path / "again", 2, **END)
    result = lorakit.train(config, listeners=[events.append])
    assert isinstance(result, lorakit.Result) and result.folder != trained.folder
    kinds = {event.kind for event in events}
    assert kinds >= {"message", "phase", "step", "progress", "validation", "checkpoint", "sample", "done"}
    assert [event.step for event in events if event.kind == "step"] == [1, 2]


def test_preflight_finds_the_problems_that_train_refuses(tiny_sd1, tmp_path) -> None:
    (empty := tmp_path / "empty").mkdir()
    config = run_config(tiny_sd1, empty, tmp_path / "run", 2)
    with pytest.raises(lorakit.LorakitError) as refused:
        lorakit.train(config)
    ready = lorakit.preflight(config)
    assert str(refused.value) == "\n".join(ready.problems)
    with pytest.raises(lorakit.LorakitError):
        ready.or_raise()


@pytest.mark.slow
def test_a_stopped_run_is_resumed(tiny_sd1, photos, tmp_path) -> None:
    config = run_config(tiny_sd1, photos, tmp_path / "run", 2, train__prior="none")
    with pytest.raises(lorakit.Stopped) as stopped:
        lorakit.train(config, stop=lambda: True)
    assert stopped.value.step == 0
    assert lorakit.resume(stopped.value.folder).steps == 2


def test_an_adapter_is_loaded_saved_inspected_and_applied(trained, tiny_sd1, tmp_path) -> None:
    from diffusers import StableDiffusionPipeline

    weights = lorakit.load_adapter(str(trained.adapter))
    paths = lorakit.save_adapter(weights, tmp_path / "copy.safetensors", formats=("kohya", "peft"), dtype="fp32")
    assert paths == {"kohya": tmp_path / "copy.safetensors", "peft": tmp_path / "copy-peft"}
    copy = lorakit.load_adapter(paths["peft"])
    assert all(torch.allclose(copy.layers[n].delta(), layer.delta()) for n, layer in weights.layers.items())
    assert "sks" in lorakit.inspect(str(paths["kohya"])).to_text()
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_sd1))
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 77, pipeline.unet.config.cross_attention_dim)
    with torch.no_grad():
        before = pipeline.unet(latents, 500, states).sample
        applied = lorakit.apply(pipeline, weights)
        after = pipeline.unet(latents, 500, states).sample
        applied.set_strength(0.0)
        assert torch.allclose(pipeline.unet(latents, 500, states).sample, before, atol=1e-6)
    assert not torch.allclose(before, after, atol=1e-6)


def test_weights_beyond_fp16_are_written_in_float32_with_a_warning(trained, tmp_path) -> None:
    weights = lorakit.load_adapter(trained.adapter)
    name, layer = next(iter(weights.layers.items()))
    layer.up.fill_(1e6)
    with pytest.warns(UserWarning, match="float32 is written instead"):
        paths = lorakit.save_adapter(weights, tmp_path / "large")
    assert torch.equal(lorakit.load_adapter(paths["kohya"]).layers[name].up, layer.up)


def test_sample_draws_the_last_pictures_of_the_run(trained, tiny_sd1, tmp_path) -> None:
    """`sample` with only the base as an option draws the same pictures as the run at its end."""
    counts: list[tuple[int, int]] = []
    options = {"base": str(tiny_sd1), "folder": tmp_path / "drawn", "progress": lambda *pair: counts.append(pair)}
    grid, *pictures = lorakit.sample(trained.adapter, **options)
    assert counts == [(number, len(pictures)) for number in range(1, len(pictures) + 1)]
    assert grid == tmp_path / "drawn" / "grid.png"
    last = sorted((trained.folder / "samples" / "step-000002").glob("*.png"))
    for one, two in zip(pictures, last, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))
    with pytest.raises(lorakit.ConfigError, match="sample"):
        lorakit.sample(trained.adapter, base=str(tiny_sd1), overrides={"sample.stepz": 3})


def test_the_example_of_the_readme_uses_public_names() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = set(re.findall(r"lorakit\.(\w+)", block))
    assert names and names <= set(lorakit.__all__)
    compile(block, str(README), "exec")
