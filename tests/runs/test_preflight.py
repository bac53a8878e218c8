"""Tests that `check`, `train` and the front end use one preflight and report the same complete list of problems."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorakit import config, families
from lorakit.cli import main as cli
from lorakit.core import install
from lorakit.core.errors import ConfigError, LorakitError
from lorakit.data import masks
from lorakit.runs import plan
from lorakit.runs.preflight import NO_NAME, Preflight, Ready, preflight

# Values of options that can be combined freely, except for a few combinations that `config.load` refuses.
TABLE: dict[str, list[Any]] = {
    "data.name": ["sks toy"] * 4 + ["sks", ""],
    "data.kind": ["subject", "style"],
    "data.flip": [False, False, True],
    "data.variants": [1, 2],
    "adapter.method": ["lora", "rslora", "dora", "pissa", "loha", "lokr"],
    "adapter.target_modules": ["attention", "linear", "linear+conv"],
    "adapter.train_text_encoder": [False, True],
    "adapter.new_tokens": [0, 0, 0, 1],
    "optimizer.name": ["adamw", "adamw", "adafactor", "lion", "prodigy", "paged_adamw8bit"],
    "optimizer.text_encoder_learning_rate": [None, None, 1e-5],
    "train.min_snr_gamma": [None, None, 5.0],
    "train.masked_loss": [False, False, False, True],
    "train.init_from": ["", "", "", "nowhere.safetensors", "some.safetensors"],
    "train.prior": ["none", "images", "teacher"],
    "memory.limit_gib": [None, None, 0.001, 8.0],
    "memory.device": ["cpu", "cpu", "auto", "mps"],
    "memory.stream_base": [False, False, False, True],
    "memory.attention": ["sdpa", "sdpa", "sdpa", "xformers"],
    "memory.compile": [False, False, False, True],
    "output.formats": [["kohya"], ["diffusers"], ["peft"], ["kohya", "diffusers"], ["kohya", "diffusers", "peft"]],
    "output.trackers": [(), (), (), ("tensorboard",)],
}


def fill(folder: Path, *, broken: bool = False, sides: bool = False) -> Path:
    """Write a folder of photos."""
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((64, 64), 40 + 20 * number).convert("RGB").save(folder / f"{number}.png")
    if broken:
        (folder / "broken.jpg").write_text("no picture", encoding="utf-8")
    if sides:
        (folder / "0.txt").write_text("sks toy on the left", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos. They are shared: only read them."""
    return fill(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_sd3

    return tiny_sd3.save_sd3(tmp_path_factory.mktemp("sd3") / "sd3")


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measured speed of this machine, from which the plan's time follows, by a constant."""
    monkeypatch.setattr(plan, "_matmul_speed", lambda: 1e10)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def requests(base: object, photos: object, **more: Any) -> config.Config:
    """Return a valid config with the changes in `more`; double underscores stand for dots."""
    settings: dict[str, Any] = {
        "model.base": str(base),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "train.steps": 2,
        "memory.device": "cpu",
    }
    return config.load(None, settings | {key.replace("__", "."): value for key, value in more.items()})


def arguments(settings: config.Config, folder: Path) -> list[str]:
    """Return the arguments of `check` and `train` for a config."""
    (folder / "asked.toml").write_text(config.to_toml(settings), encoding="utf-8")
    return ["--preset", str(folder / "asked.toml")]


def complaints(err: str) -> list[str]:
    return [line.removeprefix("lorakit: ") for line in err.splitlines() if line.startswith("lorakit: ")]


# -- what is found ---------------------------------------------------------------------------------------------------


def test_a_config_without_problems_is_ready(tiny_sd1: Path, photos: Path, here: Path) -> None:
    actual = preflight(requests(tiny_sd1, photos))
    assert actual.problems == ()
    ready = actual.or_raise()
    assert isinstance(ready, Ready) and ready.lines() == actual.lines()
    assert ready.info.family == "sd1" and ready.plan.steps == 2 and len(ready.report.items) == 3
    assert not list(here.iterdir()), "a preflight writes nothing"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data__name": ""}, NO_NAME),
        ({"adapter__method": "dora", "output__formats": ["diffusers"]}, "the diffusers format cannot carry this DoRA"),
        ({"adapter__method": "dora", "output__formats": ["peft"]}, "the PEFT format cannot carry this DoRA"),
        ({"train__masked_loss": True}, masks.NO_MASK),
        ({"train__init_from": "nowhere.safetensors"}, "train.init_from: nowhere.safetensors: no such file"),
        ({"memory__limit_gib": 0.001}, "memory.limit_gib = 0.001: a step takes "),
        ({"memory__device": "mps"}, "memory.device = 'mps': torch "),
        ({"memory__stream_base": True}, "memory.stream_base = true needs a CUDA card"),
        ({"output__folder": "there"}, "there is not empty and nothing in it is overwritten; give another --output"),
        ({"output__folder": "there/file"}, "there/file is a file; give --output a folder"),
        ({"output__folder": "there/file/run"}, "cannot write to there/file/run: Not a directory; give another"),
        ({"data__folder": "nowhere"}, "folder nowhere does not exist"),
        ({"data__folder": ""}, "no folder of photos: name one (data.folder)"),
        ({"model__base": "nowhere"}, "base nowhere does not exist"),
    ],
)
def test_each_problem_is_reported(
    tiny_sd1: Path, photos: Path, here: Path, changes: dict[str, Any], problem: str
) -> None:
    (here / "there").mkdir()
    (here / "there" / "file").touch()
    actual = preflight(requests(tiny_sd1, photos, **changes))
    assert [line for line in actual.problems if line.startswith(problem)] == list(actual.problems)
    assert len(actual.problems) == 1
    with pytest.raises(LorakitError) as caught:
        actual.or_raise()
    assert str(caught.value) == actual.problems[0]


def test_all_problems_are_reported_together(tiny_sd3: Path, here: Path) -> None:
    folder = fill(here / "photos", broken=True, sides=True)
    actual = preflight(
        requests(
            tiny_sd3,
            folder,
            data__name="",
            data__flip=True,
            data__variants=2,
            train__min_snr_gamma=5.0,
            memory__stream_base=True,
            memory__limit_gib=0.001,
            output__formats=["kohya", "diffusers"],
            adapter__method="dora",
            output__folder=str(folder),
        )
    )
    starts = ["data.name is empty", "photos is not empty", "train.min_snr_gamma is not defined", "the kohya format",
              "the diffusers format", "memory.stream_base", "memory.limit_gib", "broken.jpg", "left or"]  # fmt: skip
    assert [sum(part in line for line in actual.problems) for part in starts] == [1] * len(starts), actual.problems
    assert len(actual.problems) == len(starts)
    assert actual.plan is None and actual.report is not None


LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k."
STARTS = {
    "the adapter to start from is for sdxl, this base is sd1": {
        "lora_down.weight": (4, 2048),
        "lora_up.weight": (32, 4),
    },
    "the adapter to start from is loha: set adapter.method = 'loha'": {
        **{f"hada_w{side}_a": (32, 4) for side in "12"},
        **{f"hada_w{side}_b": (4, 768) for side in "12"},
    },
    "the adapter to start from is for FLUX.1, this base is sd1": {},
}


@pytest.mark.parametrize("problem", STARTS)
def test_an_unusable_init_adapter_is_a_problem(tiny_sd1: Path, photos: Path, here: Path, problem: str) -> None:
    tensors = {LINEAR + part: torch.ones(shape) for part, shape in STARTS[problem].items()}
    flux = "transformer.single_transformer_blocks.0.attn.to_q"
    other = {f"{flux}.lora_A.weight": torch.ones(4, 3072), f"{flux}.lora_B.weight": torch.ones(3072, 4)}
    save_file(tensors or other, "start.safetensors")
    assert preflight(requests(tiny_sd1, photos, train__init_from="start.safetensors")).problems == (problem,)


def test_without_a_base_the_other_checks_run(here: Path) -> None:
    actual = preflight(requests("nobase", "nophotos", data__name="", train__init_from="nofile.safetensors"))
    assert actual.info is None and actual.report is None and actual.plan is None and actual.to_text() == ""
    starts = ["data.name", "train.init_from: nofile", "base nobase", "folder nophotos"]
    assert [line.startswith(start) for line, start in zip(actual.problems, starts, strict=True)] == [True] * 4


def test_packages_that_are_not_installed_are_problems(
    tiny_sd1: Path, photos: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.runs.preflight.find_spec", lambda name: None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name == "diffusers" else None)
    tensorboard = install.with_bounds("tensorboard")
    needed = {"optimizer__name": "prodigy", "output__trackers": ["tensorboard"], "memory__attention": "xformers"}
    assert preflight(requests(tiny_sd1, photos, **needed)).problems == (
        f"optimizer.name = 'prodigy' needs prodigyopt; {install.hint('prodigy')}",
        f"output.trackers = 'tensorboard' needs tensorboard; install it with: {install.command(tensorboard)}",
        f"memory.attention = 'xformers' needs xformers; {install.hint('xformers')}",
    )


def test_an_option_that_an_optimizer_lacks_is_a_problem(
    tiny_sd1: Path, photos: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.core.registry.missing_package", lambda name: None)
    rates = {"optimizer__text_encoder_learning_rate": 0.5, "adapter__train_text_encoder": True}
    assert preflight(requests(tiny_sd1, photos, optimizer__name="prodigy", **rates)).problems == (
        "optimizer.name = 'prodigy' has one rate: leave optimizer.text_encoder_learning_rate, "
        "optimizer.loraplus_lr_ratio and optimizer.rates unset",
    )
    assert preflight(requests(tiny_sd1, photos, optimizer__name="paged_adamw8bit")).problems == (
        "optimizer.name = 'paged_adamw8bit' needs a CUDA device: choose 'adamw8bit' or 'adamw'",
    )


def test_a_format_that_a_program_does_not_read_is_a_warning(tiny_sd1: Path, photos: Path, here: Path) -> None:
    actual = preflight(requests(tiny_sd1, photos, adapter__method="dora"))
    assert actual.problems == ()
    assert any(line.startswith("dora in the kohya format is honoured by") for line in actual.warnings)
    assert set(actual.warnings) < set(actual.lines())
    document = actual.to_json()
    assert document["problems"] == [] and document["warnings"] == list(actual.warnings)
    assert f"warnings\n  {actual.warnings[0]}" in actual.to_text()


def test_a_resumed_run_may_have_its_folder(tiny_sd1: Path, photos: Path, here: Path) -> None:
    fill(here / "run")
    settings = requests(tiny_sd1, photos, output__folder=str(here / "run"))
    assert preflight(settings).problems and not preflight(settings, resume=True).problems


# -- one answer ------------------------------------------------------------------------------------------------------


def test_check_refuses_what_train_refuses(
    tiny_sd1: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--subject", "sks bag", "--base", str(tiny_sd1), "--set", "data.resolution=64"]
    options += ["--set", "adapter.method=dora", "--set", "output.formats=diffusers"]
    assert cli.main(["check", str(photos), *options]) == 1
    out, err = capsys.readouterr()
    assert "the plan" in out
    assert all("cannot carry this DoRA" in line for line in complaints(err))
    assert cli.main(["train", str(photos), *options]) == 1
    assert complaints(capsys.readouterr().err) == complaints(err) != []
    assert cli.main(["check", str(photos), *options, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == complaints(err) and document["plan"]["method"] == "dora"
    assert {path.name for path in here.iterdir()} == set(), "what cannot begin leaves nothing behind"


def answer_of_check(settings: config.Config, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[bool, set[str]]:
    capsys.readouterr()
    code = cli.main(["check", *arguments(settings, folder)])
    # Only terminal users type `--set`, so only the terminal advises how to exclude photos; the page has a button.
    problems = [
        line for line in complaints(capsys.readouterr().err) if not line.startswith("or leave these photos out: ")
    ]
    return code == 0, set(problems)


def answer_of_train(settings: config.Config) -> tuple[bool, set[str]]:
    """Return the result of the preflight that `training.run.train` makes before it creates a run folder."""
    try:
        ready = preflight(settings).or_raise()
    except LorakitError as error:
        return False, set(str(error).splitlines())
    assert ready.plan.steps > 0
    return True, set()


def answers(draw: random.Random, bases: list[str], folders: list[str], count: int) -> list[config.Config]:
    """Return configs with random options, except those that `config.load` refuses."""
    configs: list[config.Config] = []
    while len(configs) < count:
        some = draw.sample(sorted(TABLE), draw.randint(2, 7))
        options = {key: draw.choice(TABLE[key]) for key in some}
        options = {key.replace(".", "__"): value for key, value in options.items() if value is not None}
        try:
            configs.append(requests(draw.choice(bases), draw.choice(folders), **options))
        except ConfigError:
            continue
    return configs


@pytest.mark.slow
def test_check_train_and_the_front_end_give_one_answer(
    tiny_sd1: Path,
    tiny_sdxl: Path,
    tiny_sd3: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    answer_of_page: Callable[[config.Config], tuple[bool, set[str]]],
) -> None:
    good, broken = fill(here / "good"), fill(here / "broken", broken=True)
    sides = fill(here / "sides", sides=True)
    bases = [str(tiny_sd1), str(tiny_sdxl), str(tiny_sd3), str(tiny_sd1), str(here / "nobase")]
    folders = [str(good), str(good), str(good), str(broken), str(sides), str(here / "nowhere")]
    (here / "some.safetensors").write_bytes(b"no adapter")
    accepted = 0
    for requests in answers(random.Random(2), bases, folders, 75):
        train = answer_of_train(requests)
        assert answer_of_check(requests, here, capsys) == train, requests
        assert answer_of_page(requests) == train, requests
        accepted += train[0]
    assert 7 < accepted < 68, "both answers were given often"


@pytest.fixture
def answer_of_page(tiny_sd1: Path, here: Path) -> Callable[[config.Config], tuple[bool, set[str]]]:
    """Return a function that gives the front end's answer: whether a run may start, and the problems."""
    pytest.importorskip("gradio", reason="the front end needs gradio: pip install 'lorakit[ui]'")
    from lorakit.ui.workspace import Workspace

    workspace = Workspace(here / "runs", [here, tiny_sd1.parent])

    def answer(requests: config.Config) -> tuple[bool, set[str]]:
        result: Preflight = workspace.preflight(requests)
        assert result.config.output == requests.output
        return not result.problems, set(result.problems)

    return answer


def test_train_runs_the_preflight_before_it_creates_a_folder(tiny_sd1: Path, photos: Path, here: Path) -> None:
    from lorakit.training import run

    wrong = requests(tiny_sd1, photos, data__name="", train__masked_loss=True, output__folder="run")
    with pytest.raises(LorakitError) as caught:
        run.train(wrong)
    assert str(caught.value).splitlines() == [NO_NAME, masks.NO_MASK]
    assert not (here / "run").exists()


def test_a_hub_id_is_pinned(tiny_sd1: Path, photos: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = config.ModelConfig(base=str(tiny_sd1))
    monkeypatch.setattr(families, "pin", lambda model: pinned)
    assert preflight(requests("owner/name", photos)).config.model == pinned
