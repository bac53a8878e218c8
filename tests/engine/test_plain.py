"""Tests that the plain engine, with diffusers' and PEFT's own modules, trains as the fused engine does."""

import json
from pathlib import Path
from typing import Any

import pytest
import short_run
import tiny_sd3 as make_sd3
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file

from lorakit import adapters, config, families
from lorakit.engine import fused_blocks
from lorakit.training import run as train
from lorakit.training.optimizer_step import OptimizerStep

pytestmark = pytest.mark.usefixtures("copied_modules")
STEPS = 2
# The engines add in different order, and AdamW turns a gradient near 0 into a whole step. So the tests compare the
# norm of the difference, not single values.
LOSS, WEIGHTS = 1e-4, 5e-3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos: a batch of two and a batch of one."""
    return short_run.noise(tmp_path_factory.mktemp("photos"), 3)


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 without T5."""
    return make_sd3.save_sd3(tmp_path_factory.mktemp("tiny") / "sd3", t5=False)


@pytest.fixture(scope="module")
def plain(tiny_sd1: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> train.Result:
    """A plain run of two steps. It is shared: only read its folder."""
    return run(tiny_sd1, photos, tmp_path_factory.mktemp("plain") / "run", "plain")


def run(base: Path, photos: Path, folder: Path, engine: str, **changes: Any) -> train.Result:
    one = {"sample__prompts": ("a photo of sks toy",), "sample__every": 100, "train__validate_every": 100}
    changes = {**one, "memory__engine": engine, **changes}
    return train.train(short_run.run_config(base, photos, folder, STEPS, **changes))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder) if event.get("kind", event.get("event")) == "step"]


def differ(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference relative to the second norm, over all tensors together."""
    assert one.keys() == two.keys()
    a, b = (torch.cat([tensors[name].flatten().float() for name in sorted(tensors)]) for tensors in (one, two))
    return float((a - b).norm() / b.norm())


# Each family and each method.
PAIRS = [("sd1", "lora"), ("sd1", "dora"), ("sdxl", "lokr"), ("sd3", "lora")]
QUICK = [("sd1", "lora"), ("sd3", "lora")]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "method"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_both_engines_train_the_same(request: Any, photos: Path, tmp_path: Path, name: str, method: str) -> None:
    base = request.getfixturevalue(f"tiny_{name}")
    changes: dict[str, Any] = {"adapter__method": method, "train__gradient_accumulation_steps": 2}
    if name == "sd3":
        changes["output__formats"] = ["peft"]
    fused = run(base, photos, tmp_path / "fused", "fused", **changes)
    plain = run(base, photos, tmp_path / "plain", "plain", **changes)
    assert losses(plain.folder) == pytest.approx(losses(fused.folder), rel=LOSS)
    assert len(losses(plain.folder)) == STEPS
    folders = [result.folder / "checkpoints" / f"step-{STEPS:06d}" for result in (plain, fused)]
    assert differ(*(load_file(folder / "adapter.safetensors") for folder in folders)) < WEIGHTS
    # Both engines save the optimizer's state in the same form.
    one, two = (load_file(folder / "optimizer.safetensors") for folder in folders)
    assert {key: (t.shape, t.dtype) for key, t in one.items()} == {key: (t.shape, t.dtype) for key, t in two.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("tiny_sd1", "lokr"), ("tiny_sd3", "lora")])
def test_a_plain_unet_has_no_class_of_lorakit(
    request: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    classes: dict[str, set[str]] = {}

    def watched(self: OptimizerStep, number: int) -> Any:
        unet = self.loss_step.family.denoiser
        classes[engine] = {type(m).__module__ for m in unet.modules() if type(m).__module__.startswith("lorakit")}
        assert engine == "fused" or not self.flats
        raise KeyboardInterrupt

    for engine in ("plain", "fused"):
        with monkeypatch.context() as patch:
            patch.setattr(OptimizerStep, "__call__", watched)
            with pytest.raises(KeyboardInterrupt):
                formats = {"output__formats": ["peft"]} if name == "tiny_sd3" else {}
                run(request.getfixturevalue(name), photos, tmp_path / engine, engine, adapter__method=method, **formats)
    assert classes["plain"] == set() and classes["fused"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_a_stopped_plain_run_continues_to_the_same_bits(
    tiny_sd1: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__gradient_accumulation_steps": 2, "optimizer__lr_scheduler": "cosine"}
    straight = run(tiny_sd1, photos, tmp_path / "straight", "plain", **changes)
    step = OptimizerStep.__call__

    def stopping(self: OptimizerStep, number: int) -> Any:
        if number == 1:
            (tmp_path / "cut" / "stop").write_text("")
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerStep, "__call__", stopping)
        with pytest.raises(train.Stopped):
            run(tiny_sd1, photos, tmp_path / "cut", "plain", **changes)
    resumed = train.resume(tmp_path / "cut")
    one, two = load_file(straight.adapter), load_file(resumed.adapter)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
@pytest.mark.parametrize("saving", [{"memory__gradient_checkpointing": True}, {"memory__limit_gib": 1.0}])
def test_recomputing_blocks_works_in_the_plain_engine(
    tiny_sd1: Path, photos: Path, plain: train.Result, tmp_path: Path, saving: Any
) -> None:
    result = run(tiny_sd1, photos, tmp_path / "run", "plain", **saving)
    assert differ(load_file(result.adapter), load_file(plain.adapter)) < WEIGHTS


class OtherResnet(ResnetBlock2D):
    """A resnet class that lorakit does not know."""


class OtherAttention(Attention):
    """An attention class that lorakit does not know."""


class OtherProcessor(AttnProcessor2_0):
    """An attention processor that lorakit does not know."""


def replace_resnet(unet: Any) -> None:
    unet.mid_block.resnets[0].__class__ = OtherResnet


def replace_attention(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.__class__ = OtherAttention


def replace_processor(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = OtherProcessor()


REPLACEMENTS = [
    (replace_resnet, "mid_block.resnets.0: OtherResnet"),
    (replace_attention, "mid_block.attentions.0.transformer_blocks.0.attn1: OtherAttention"),
    (replace_processor, "mid_block.attentions.0.transformer_blocks.0.attn2: OtherProcessor"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
@pytest.mark.parametrize(("replace", "block"), REPLACEMENTS)
def test_a_unet_with_an_unknown_block_is_trained_plainly_and_says_so(
    tiny_sd1: Path,
    photos: Path,
    plain: train.Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replace: Any,
    block: str,
) -> None:
    from lorakit.families import loading

    load = loading.load_unet

    def changed(*args: Any, **options: Any) -> Any:
        unet = load(*args, **options)
        replace(unet)
        return unet

    monkeypatch.setattr(loading, "load_unet", changed)
    result = run(tiny_sd1, photos, tmp_path / "run", "fused")
    messages = [event["message"] for event in events(result.folder) if "message" in event]
    line = f"the UNet has a block that lorakit cannot fuse ({block}): memory.engine = 'plain' is used. "
    assert messages.count(line + "Training is correct, only slower.") == 1
    one, two = load_file(result.adapter), load_file(plain.adapter)
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_a_unet_with_fusible_blocks_is_fused_without_a_note(tiny_sd1: Path, photos: Path, tmp_path: Path) -> None:
    family = families.load(families.describe(tiny_sd1), "cpu", torch.float32)
    assert fused_blocks.unknown_block(family.denoiser) is None and family.plain is False
    result = run(tiny_sd1, photos, tmp_path / "run", "fused")
    assert "cannot fuse" not in (result.folder / "log.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changed", [lambda *_: torch.zeros(1, 64, 4, 4), lambda self, x: x], ids=["another result", "other arguments"]
)
def test_a_changed_forward_in_diffusers_is_detected(
    tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch, changed: Any
) -> None:
    family = families.load(families.describe(tiny_sd1), "cpu", torch.float32)
    monkeypatch.setattr(fused_blocks.FusedResnet, "forward", changed)
    fused_blocks._differing_class.cache_clear()
    try:
        block = fused_blocks.unknown_block(family.denoiser)
        assert block is not None and block.endswith(": ResnetBlock2D")
    finally:
        fused_blocks._differing_class.cache_clear()


def test_a_finished_adapter_is_applied_with_pefts_layers(tiny_sd1: Path) -> None:
    info, settings = families.describe(tiny_sd1), config.LoraConfig(rank=2)
    family = families.load(info, "cpu", torch.float32, "full", False, True)
    weights = adapters.attach(families.load(info, "cpu", torch.float32), settings).weights()
    adapters.apply(family, weights)
    assert not any(type(module).__module__.startswith("lorakit") for module in family.denoiser.modules())
