"""Tests that the registry's family specs agree with diffusers, and that a package can add a family."""

import subprocess
import sys
from pathlib import Path

import pytest

from lorakit import families
from lorakit.core import registry
from lorakit.families import spec, unet


def test_every_spec_has_its_name_in_the_registry() -> None:
    assert all(family.name == name for name, family in registry.FAMILIES.items())
    assert list(registry.versions()) == ["sd1", "sd2", "sdxl", "sd3"]
    for name, (family, version) in registry.versions().items():
        assert registry.family_of(name) is family and registry.version_of(name) is version


def test_classes_of_a_spec_exist_and_follow_the_protocol() -> None:
    import diffusers

    for family in registry.FAMILIES.values():
        assert hasattr(diffusers, f"{family.pipeline}Pipeline") and hasattr(diffusers, family.denoiser_class)
        loaded = registry.resolve(family.loader)
        assert all(hasattr(loaded, name) for name in ("tokens", "encode_tokens", "predict", "pipeline", "modules"))


def test_programs_of_the_readers_are_registered() -> None:
    from lorakit.formats import compatibility

    for _, version in registry.versions().values():
        assert version.readers.keys() <= compatibility.CONSUMERS.keys()


def test_presets_of_every_version_exist() -> None:
    from lorakit import config

    for _, version in registry.versions().values():
        assert {f"subject-{version.preset}", f"style-{version.preset}"} <= set(config.preset_names())


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("StableDiffusionPipeline", "sd"),
        ("StableDiffusionInpaintPipeline", "sd"),
        ("StableDiffusionXLPipeline", "sdxl"),
        ("StableDiffusion3Pipeline", "sd3"),
    ],
)
def test_the_longest_prefix_of_a_pipeline_class_gives_the_family(pipeline: str, name: str) -> None:
    spec_of_class = families.of_pipeline(pipeline)
    assert spec_of_class is not None and spec_of_class.name == name


@pytest.mark.parametrize("pipeline", ["StableDiffusionUpscalePipeline", "FluxPipeline", ""])
def test_other_pipelines_have_no_family(pipeline: str) -> None:
    assert families.of_pipeline(pipeline) is None


def test_an_unknown_width_gives_the_first_version() -> None:
    family = registry.FAMILIES["sd"]
    assert [family.version(width).name for width in (768, 1024, 32)] == ["sd1", "sd2", "sd1"]


def test_the_sides_of_buckets_are_multiples_of_what_the_unet_halves() -> None:
    layers = {
        "unet.down_blocks.0.downsamplers.0.conv": (32, 32, 3, 3),
        "unet.down_blocks.1.downsamplers.0.conv": (64, 64, 3, 3),
        "unet.up_blocks.0.upsamplers.0.conv": (64, 64, 3, 3),
    }
    assert unet.bucket_multiple(layers, 4) == 16


def test_attention_is_counted_for_each_query() -> None:
    layers = {f"unet.mid_block.attentions.0.transformer_blocks.0.attn{n}.to_q": (8, 8) for n in (1, 2)}
    assert [use.attended for use in unet.layer_uses(layers, 4, 6, 77)] == [24 * 24, 24 * 77]


def test_an_unknown_family_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"unknown family 'flux'; known: sd1, sd2, sdxl, sd3\. .* lorakit\.families"):
        registry.family_of("flux")


def test_an_installed_package_adds_a_family_by_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "outsider.py").write_text(
        "import dataclasses\nfrom lorakit.families.sd.spec import SPEC as SD\n"
        "version = dataclasses.replace(SD.versions[0], name='mine')\n"
        "SPEC = dataclasses.replace(SD, name='mine', pipeline='MinePipeline', versions=(version,))\n"
    )
    metadata = tmp_path / "outsider-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lorakit.families]\nmine = outsider:SPEC\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lorakit.core import registry\nfrom lorakit import families\n"
        "print(*registry.versions(), families.of_pipeline('MinePipeline').name, 'torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["sd1", "sd2", "sdxl", "sd3", "mine", "mine", "False"]


def test_a_version_without_v_names_has_one_name() -> None:
    tags = spec.Tags("plain", "plain/lora", "P")
    assert tags.of(spec.VELOCITY) == tags.of(spec.EPSILON) == ("plain", "plain/lora")
