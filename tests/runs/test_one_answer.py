"""Tests that `check` refuses what `train` would refuse before its first step: optimizers, masks, init adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorakit import adapters, config, families, formats
from lorakit.adapters.weights import AdapterWeights
from lorakit.core.errors import LorakitError
from lorakit.data import masks
from lorakit.families import BaseInfo
from lorakit.formats import kohya, peft
from lorakit.runs import plan
from lorakit.runs.preflight import preflight
from lorakit.training import optimizers, run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos, the second with a black mask, and a third photo that is fully transparent."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        Image.effect_noise((64, 64), 40 + 20 * number).convert("RGB").save(folder / f"{number}.png")
    Image.new("L", (64, 64)).save(folder / "1.mask.png")
    Image.new("RGBA", (64, 64)).save(folder / "2.png")
    return folder


@pytest.fixture
def problems(
    tiny_sd1: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, ...]]:
    """Return the problems of a preflight; `train` must raise the same ones and leave no folder."""
    monkeypatch.setattr(plan, "_matmul_speed", lambda: 1e10)
    monkeypatch.chdir(tmp_path)

    def ask(**changes: Any) -> tuple[str, ...]:
        settings = {"model.base": str(tiny_sd1), "data.folder": str(photos), "data.name": "sks toy", "train.steps": 2}
        settings |= {"data.resolution": 64, "memory.device": "cpu", "adapter.target_modules": "attention"}
        settings |= {"adapter.train_text_encoder": False, "adapter.rank": 4}
        requests = config.load(None, settings | {key.replace("__", "."): value for key, value in changes.items()})
        answer = preflight(requests).problems
        if answer:
            with pytest.raises(LorakitError) as caught:
                run.train(requests)
            assert tuple(str(caught.value).splitlines()) == answer
        assert not (tmp_path / "runs").exists()
        return answer

    return ask


@pytest.mark.parametrize(
    ("name", "args", "problem"),
    [
        ("torch.optim:NoSuch", {}, "optimizer.name = 'torch.optim:NoSuch': torch.optim has no NoSuch"),
        ("no_such.package:X", {}, "optimizer.name = 'no_such.package:X': the package no_such is not installed"),
        ("torch.nn:Linear", {}, "optimizer.name = 'torch.nn:Linear': Linear is not a torch.optim.Optimizer"),
        ("torch.optim:RAdam", {"beta": 1}, "optimizer.args.beta: RAdam has no such argument; it has lr, betas"),
        ("torch.optim:RAdam", {"betas": [2, 0]}, "optimizer.args: RAdam refuses them: Invalid beta parameter"),
        ("torch.optim:SGD", {"nesterov": True}, "optimizer.args: SGD refuses them: Nesterov momentum requires"),
        ("torch.optim:LBFGS", {}, "optimizer.name = 'torch.optim:LBFGS': LBFGS computes the loss several times"),
        ("torch.optim:SparseAdam", {}, "optimizer.name = 'torch.optim:SparseAdam': a step failed: SparseAdam does not"),
        ("adamw", {"beta": 1}, "optimizer.args: adamw does not take them: "),
        ("adamw", {"betas": 0.9}, "optimizer.args: adamw does not take them: "),
        ("adamw", {"eps": "small"}, "optimizer.args: adamw does not take them: "),
        ("lion", {"betas": [0.9]}, "optimizer.args: Lion refuses them: betas must be two numbers from 0 to 1"),
        ("adafactor", {"eps": 1}, "optimizer.name = 'adafactor': a step failed: "),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_a_problem(
    problems: Callable[..., tuple[str, ...]], name: str, args: dict[str, Any], problem: str
) -> None:
    (answer,) = problems(optimizer__name=name, optimizer__args=args)
    assert answer.startswith(problem) and "\n" not in answer


def test_optimizers_that_can_be_built_pass(problems: Callable[..., tuple[str, ...]]) -> None:
    assert problems(optimizer__name="torch.optim:Adadelta", optimizer__args={"rho": 0.8}) == ()
    assert problems(optimizer__args={"betas": [0.9, 0.95]}) == ()
    assert problems(optimizer__name="torch.optim:Rprop", optimizer__weight_decay=0.2) == (
        "optimizer.weight_decay: Rprop has no weight decay: leave it out",
    )


def test_a_module_that_fails_at_import_is_a_problem(
    problems: Callable[..., tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "breaks.py").write_text("raise AttributeError('no card\\nhere')")
    assert problems(optimizer__name="breaks:X") == (
        "optimizer.name = 'breaks:X': breaks cannot be imported: no card here",
    )


def test_no_trial_step_runs_if_cuda_is_possible() -> None:
    from lorakit.config import OptimizerConfig, optimizer_builder

    only_sparse = OptimizerConfig(name="torch.optim:SparseAdam")
    assert optimizer_builder.problem(only_sparse, has_cuda=True) is None
    assert type(optimizers.build(only_sparse, [("unet", [torch.nn.Parameter(torch.ones(1))])])).__name__ == "SparseAdam"


def test_masks_that_hide_everything_are_a_problem(problems: Callable[..., tuple[str, ...]]) -> None:
    assert problems(train__masked_loss=True) == tuple(masks.BLACK_MASK.format(photo=f"{n}.png") for n in (1, 2))
    assert problems() == ()


def test_transparency_counts_as_a_mask(problems: Callable[..., tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / "cut-out").mkdir()
    half = Image.new("RGBA", (64, 64), "teal")
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    half.save(tmp_path / "cut-out" / "a.png")
    assert problems(data__folder=str(tmp_path / "cut-out"), train__masked_loss=True) == ()


@pytest.fixture(scope="module")
def weights(tiny_sd1: Path) -> AdapterWeights:
    """An adapter of rank 4 for the UNet's attention. It is shared: only read it."""
    family = families.load(families.describe(tiny_sd1), "cpu", torch.float32)
    return adapters.attach(
        family, config.LoraConfig(rank=4, target_modules="attention", train_text_encoder=False)
    ).weights()


def test_an_adapter_to_start_from_is_compared_layer_by_layer(
    problems: Callable[..., tuple[str, ...]], weights: AdapterWeights, tmp_path: Path
) -> None:
    (file,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    peft.write(weights, tmp_path / "a-peft", dtype="fp32", metadata={})
    for start in (str(file), str(tmp_path / "a-peft")):
        assert problems(train__init_from=start) == ()
        (answer,) = problems(train__init_from=start, adapter__rank=8)
        assert answer.startswith("the adapter to start from has rank 4 in unet.down") and answer.endswith("rank = 4")
        (answer,) = problems(train__init_from=start, adapter__target_modules="linear")
        assert answer.startswith("the adapter to start from has other layers: ") and "0 are too many" in answer
        (answer,) = problems(train__init_from=start, adapter__method="lokr")
        assert answer == "the adapter to start from is lora: set adapter.method = 'lora'"
        assert problems(train__init_from=start, adapter__new_tokens=2) == ()


def test_a_start_folder_that_is_not_an_adapter_is_a_problem(
    problems: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (answer,) = problems(train__init_from="empty")
    assert answer == "empty: holds 0 .safetensors files and no PEFT adapter: name the file itself"


def test_an_adapter_with_nan_is_a_problem(
    problems: Callable[..., tuple[str, ...]], weights: AdapterWeights, tmp_path: Path
) -> None:
    (file,) = kohya.write(weights, tmp_path / "a.safetensors", dtype="fp32", metadata={})
    raw = bytearray(file.read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"
    file.write_bytes(raw)
    with pytest.raises(LorakitError) as caught:
        formats.read(file)
    assert problems(train__init_from=str(file)) == (str(caught.value),)


def test_vectors_of_another_word_are_a_problem(
    problems: Callable[..., tuple[str, ...]], tiny_sd1: Path, tmp_path: Path
) -> None:
    info: BaseInfo = families.describe(tiny_sd1)
    section = config.LoraConfig(rank=4, target_modules="attention", train_text_encoder=False, new_tokens=2)
    trained = adapters.attach(families.load(info, "cpu", torch.float32), section, trigger="zyx").weights()
    formats.save(trained, tmp_path, "word", ("kohya",), "fp32", {})
    assert problems(train__init_from=str(tmp_path / "word.safetensors")) == (
        "the adapter to start from learned the word 'zyx' with adapter.new_tokens = 2: set that, and begin data.name "
        "with 'zyx'",
    )
