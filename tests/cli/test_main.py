"""The command line: arguments, exit codes, pipes, and one complete train, inspect, export and sample."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit import config
from lorakit.cli import main as cli, train_commands
from lorakit.core.errors import LorakitError, Stopped
from lorakit.runs.run_folder import RunFolder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(short_validation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that runs a command in an empty folder and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAKIT_TRACEBACK", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures of noise with 64 px."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in bash. `lorakit` in it is this checkout."""
    root = Path(cli.__file__).parents[2]
    program = f"{sys.executable} -m lorakit"
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "LC_ALL", "LANG")}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", re.sub(r"\blorakit\b", program, command)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=inherited | {"PYTHONPATH": str(root)} | environment,
    )


# -- wrong usage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "(did you mean train?)"),
        (["export", "file", "--to", "kohia"], "(did you mean kohya?)"),
        (["train", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["train", "photos", "--subject", "a", "--style", "b"], "not allowed with argument"),
        (["sample", "file", "--strength", "0,half"], "'0,half': write numbers separated by commas, e.g. 0,0.5,1"),
        (["sample", "file", "--strength", "nan"], "'nan': write numbers separated by commas"),
        (["sample", "file", "--size", "500"], "'500': must be a multiple of 8 from 64 to 4096"),
        (["sample", "file", "--size", "big"], "'big': must be a multiple of 8 from 64 to 4096"),
        (["resume"], "RUN"),
    ],
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["train", "--subject", "sks toy"], ["name the folder of photos: lorakit check PHOTOS, lorakit train PHOTOS"]),
        (["check"], ["name the folder of photos: lorakit check PHOTOS, lorakit train PHOTOS"]),
        (
            ["train", "photos", "--preset", "subject-sd16"],
            ["unknown preset 'subject-sd16' (did you mean subject-sd15?)"],
        ),
        (
            ["train", "photos", "--set", "train.stepz=1", "--set", "adapter.rank=many"],
            ["unknown option train.stepz", "adapter.rank = 'many': must be a whole number"],
        ),
        (["check", "photos", "--set", "nothing", "--set", "=1"], ["'nothing': write it as", "'=1': write it as"]),
        (["demo", "--set", "train.stepz=1"], ["unknown option train.stepz"]),
    ],
)
def test_wrong_settings_exit_with_2_and_a_line_each(run: Run, arguments: list[str], messages: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == len(messages)
    assert all(line.startswith("lorakit: ") for line in lines)
    assert all(any(message in line for line in lines) for message in messages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere", "--subject", "sks toy"], "folder nowhere does not exist"),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["export", "nowhere.safetensors", "--to", "peft"], "nowhere.safetensors: no such file"),
        (["sample", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["demo", "--subject", "nobody"], "unknown subject 'nobody'; bundled subjects: zib, "),
        (["check", "photos", "--base", "nowhere"], "nowhere"),
        (["check", "photos", "--preset", "none.toml"], "config file none.toml does not exist"),
        (["check", "photos", "--prompts", "none.txt"], "--prompts none.txt: no such file"),
        (["import-config", "none.toml"], "none.toml does not exist"),
    ],
)
def test_a_failed_command_exits_with_1_and_one_line(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 1
    assert err.startswith("lorakit: ") and err.count("\n") == 1
    assert message in err


def test_the_demo_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there" / "photos").mkdir(parents=True)
    (tmp_path / "there" / "photos" / "mine.png").touch()
    code, _, err = run("demo", "--output", "there")
    assert code == 1
    assert err == "lorakit: there/photos is not empty; give another folder with --output\n"


# -- errors that the user did not cause -----------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_an_internal_error_is_one_line_and_a_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "every_option", raising(ZeroDivisionError("one\ntwo")))
    code, out, err = run("options")
    assert (code, out) == (1, "")
    match = re.fullmatch(r"lorakit: internal error: ZeroDivisionError: one; traceback in (\S+)\n", err)
    assert match is not None
    log = Path(match[1])
    assert "Traceback (most recent call last)" in log.read_text(encoding="utf-8")
    log.unlink()


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), LorakitError("yours")])
def test_lorakit_traceback_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(config, "every_option", raising(error))
    monkeypatch.setenv("LORAKIT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run("options")


def test_too_little_memory_is_reported_with_remedies(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(config, "every_option", raising(torch.cuda.OutOfMemoryError("tried to allocate 2 GiB")))
    code, _, err = run("options")
    assert code == 1
    assert err == (
        "lorakit: this command: not enough memory on the device; cheapest first, set "
        "memory.gradient_checkpointing = true, memory.base_storage = 'nf4', memory.stream_base = true, "
        "train.batch_size = 1 with train.gradient_accumulation_steps = ..., or a lower data.resolution\n"
    )


def test_an_interrupt_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "every_option", raising(KeyboardInterrupt()))
    assert run("options") == (130, "", "lorakit: interrupted\n")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (Stopped(Path("runs/a"), 13), 130, "lorakit: stopped after step 13; go on with: lorakit resume runs/a\n"),
        (LorakitError("one\ntwo"), 1, "lorakit: one\nlorakit: two\n"),
    ],
)
def test_every_line_of_an_error_is_prefixed(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, lines: str
) -> None:
    monkeypatch.setattr(RunFolder, "require", lambda _: None)  # the run need not exist
    monkeypatch.setattr("lorakit.training.run.resume", raising(error))
    assert run("resume", "runs/a")[::2] == (code, lines)


def test_a_stopped_demo_is_no_internal_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.training import run as train

    monkeypatch.setattr(train, "train", raising(train.Stopped(Path("there/run"), 13)))
    code, _, err = run("demo", "--output", "there")
    assert code == 130
    assert err == "lorakit: stopped after step 13; go on with: lorakit resume there/run\n"


# -- pipes and terminals --------------------------------------------------------------------------------------------


def test_a_closed_pipe_is_no_error() -> None:
    process = shell("lorakit options | head -n 1")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == 'model.base = "pocket"  (text)\n'


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_output_that_cannot_be_written_is_no_error(redirection: str) -> None:
    """If stdout is closed, Python sets `sys.stdout` to None. At exit it reports output that it cannot flush."""
    process = shell(f"lorakit options {redirection}")
    assert (process.returncode, process.stderr) == (0, "")
    process = shell(f"lorakit train nowhere {redirection}")
    assert process.returncode == 1 and "internal error" not in process.stderr


def test_names_outside_of_the_locale_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "фото").mkdir()
    process = shell(f"lorakit check '{tmp_path}/фото'", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    (line,) = process.stderr.splitlines()
    assert line.startswith("lorakit: data.folder = ") and line.endswith("if the name is right, set PYTHONUTF8=1")
    assert process.returncode == 2


@pytest.mark.parametrize("columns", ["10", "40", "200"])
def test_help_fits_any_terminal_and_has_no_colours(columns: str) -> None:
    process = shell("lorakit train --help", COLUMNS=columns)
    assert process.returncode == 0
    assert "\x1b" not in process.stdout
    assert "--subject" in process.stdout


# -- the choice of the preset ---------------------------------------------------------------------------------------


def arguments(*words: str) -> Any:
    return cli.parser().parse_args(["train", "photos", *words])


def resolved(*words: str) -> tuple[config.Config, str]:
    """Return the config of these arguments, and the note about the preset."""
    import io

    from lorakit.cli.terminal import Terminal

    stream = io.StringIO()
    return train_commands.resolve(arguments(*words), Terminal(stream)), stream.getvalue()


def test_without_a_base_the_bundled_one_is_trained() -> None:
    settings, note = resolved("--subject", "sks toy")
    assert note == "preset: subject-pocket (for the bundled base)\n"
    assert settings == config.load("subject-pocket", {"data.folder": "photos", "data.name": "sks toy"})


def test_a_style_has_its_own_preset() -> None:
    settings, note = resolved("--style", "sks style")
    assert note.startswith("preset: style-pocket ")
    assert (settings.data.kind, settings.data.name) == ("style", "sks style")


@pytest.mark.parametrize("way", ["--base", "--set"])
def test_the_preset_follows_the_family_of_the_base(way: str, tiny_sd1: Path, tiny_sdxl: Path) -> None:
    for base, preset in ((tiny_sd1, "sd15"), (tiny_sdxl, "sdxl")):
        value = str(base) if way == "--base" else f"model.base={base}"
        settings, note = resolved("--style", "sks style", way, value)
        assert note.startswith(f"preset: style-{preset} (for a base of the family sd")
        assert note.endswith("--preset chooses another)\n")
        assert settings.model.base == str(base)


def test_a_named_preset_is_used_without_a_note() -> None:
    settings, note = resolved("--preset", "subject-sdxl", "--subject", "sks toy", "--base", "sdxl.safetensors")
    assert note == ""
    assert settings.data.resolution == 1024


def test_set_overrides_flags_and_flags_override_the_preset() -> None:
    settings, _ = resolved(
        "--subject", "sks toy", "--output", "out", "--set", "data.name=zwx cat", "--set", "adapter.rank=3"
    )
    assert (settings.data.name, settings.adapter.rank, settings.output.folder) == ("zwx cat", 3, "out")


def test_a_resolved_config_works_as_a_preset(tmp_path: Path) -> None:
    first, _ = resolved("--subject", "sks toy", "--set", "train.steps=7")
    (tmp_path / "config.toml").write_text(config.to_toml(first), encoding="utf-8")
    reloaded, _ = resolved("--preset", str(tmp_path / "config.toml"))
    assert reloaded == first


# -- check ----------------------------------------------------------------------------------------------------------


def small(base: Path, *more: str) -> list[str]:
    """Return the arguments of a short run on a tiny base."""
    settings = {
        "data.resolution": "64",
        "train.steps": "2",
        "adapter.rank": "2",
        "optimizer.learning_rate": "1e-2",
        "train.prior": "none",
        "sample.steps": "2",
        "memory.device": "cpu",
        "sample.prompts": "a photo of sks toy",
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["--subject", "sks toy", "--base", str(base), *sets, *more]


def test_check_ends_with_the_plan(run: Run, photos: Path, tiny_sd1: Path) -> None:
    code, out, err = run("check", photos, *small(tiny_sd1), "--set", "optimizer.warmup_steps=0")
    assert (code, err) == (0, "")
    for file in photos.iterdir():
        assert file.name in out
    plan = out.partition("\nthe plan\n")[2].partition("\n\n")[0].splitlines()
    assert [line.strip().partition(":")[0] for line in plan] == [
        *("base", "photos", "in prompts", "adapter", "strength", "length", "note", "memory", "time")
    ]


def scripted(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new Python process."""
    command, root = [sys.executable, "-c", script, *arguments], Path(cli.__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


def test_check_loads_no_model(photos: Path, tiny_sd1: Path) -> None:
    script = (
        "import sys; from lorakit.cli.main import main; "
        "main(sys.argv[1:]); print('torch' in sys.modules, file=sys.stderr)"
    )
    process = scripted(script, "check", str(photos), *small(tiny_sd1))
    assert (process.returncode, process.stderr) == (0, "False\n")


@pytest.mark.slow
@pytest.mark.parametrize("begins", [False, True])
def test_plan_and_errors_are_reported_before_the_model_libraries_are_loaded(
    photos: Path, tiny_sd1: Path, begins: bool
) -> None:
    if not begins:
        (photos / "broken.jpg").write_text("no picture", encoding="utf-8")
    script = (
        "import builtins, sys\n"
        "load = builtins.__import__\n"
        "def until_models(name, *rest, **named):\n"
        "    if name.partition('.')[0] in ('diffusers', 'transformers', 'peft'):\n"
        "        sys.exit(7)\n"
        "    return load(name, *rest, **named)\n"
        "builtins.__import__ = until_models\n"
        "from lorakit.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = scripted(script, "train", str(photos), *small(tiny_sd1))
    assert process.returncode == (7 if begins else 1)
    kinds = [line.partition(":")[0] for line in process.stdout.splitlines()]
    assert ({"base", "photos", "length", "memory", "time"} <= set(kinds)) == begins
    assert ("broken.jpg" in process.stderr) != begins


def test_check_in_json_is_one_document(run: Run, photos: Path, tiny_sd1: Path) -> None:
    code, out, _ = run("check", photos, *small(tiny_sd1), "--json")
    document = json.loads(out)
    assert code == 0
    assert len(document["check"]["photos"]) == 4
    assert document["plan"]["steps"] == 2


def test_check_with_errors_exits_with_1(run: Run, photos: Path, tiny_sd1: Path) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    code, out, _ = run("check", photos, *small(tiny_sd1))
    assert code == 1
    assert "broken.png" in out and "the plan" not in out
    code, out, _ = run("check", photos, *small(tiny_sd1), "--json")
    assert code == 1
    assert json.loads(out)["plan"] is None


def test_warnings_do_not_fail_the_check(run: Run, photos: Path, tiny_sd1: Path) -> None:
    (photos / "again.png").write_bytes((photos / "0.png").read_bytes())
    code, out, _ = run("check", photos, *small(tiny_sd1))
    assert code == 0
    assert "the same file" in out


# -- train, inspect, export, sample ---------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.slow
def test_train_inspect_export_sample(run: Run, photos: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    before = digests(photos)
    code, out, err = run("train", photos, *small(tiny_sd1), "--output", "run", "--json")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and {"phase", "message", "step", "progress", "checkpoint", "done"} <= set(kinds)
    assert Path(events[0]["folder"]) == tmp_path / "run" and events[0]["steps"] == 2
    document = events[-1]
    assert document["event"] == "result"
    adapter = Path(document["adapter"])
    assert adapter.is_file() and document["steps"] == 2
    assert all(finding["passed"] for finding in document["findings"])
    assert "training unet: " in err and "length: 2 steps" in err
    assert digests(photos) == before

    code, out, _ = run("inspect", adapter)
    assert code == 0 and "sks toy" in out
    assert isinstance(json.loads(run("inspect", adapter, "--json")[1]), dict)

    code, out, _ = run("export", adapter, "--to", "peft", "--dtype", "fp32", "--output", "exported")
    assert code == 0 and Path(out.strip()).is_dir()

    code, out, err = run(
        "sample", adapter, "--base", tiny_sd1, "--strength", "0,1", "--output", "drawn", "--prompt", "a toy"
    )
    assert code == 0, err
    assert out == "drawn/grid.png\n"
    base, adapted = (Image.open(tmp_path / "drawn" / f"01-strength-{strength}.png") for strength in (0, 1))
    assert base.size == adapted.size == (64, 64)
    assert base.tobytes() != adapted.tobytes()

    code, _, err = run("train", photos, *small(tiny_sd1), "--output", "run")
    assert code == 1 and "run is not empty" in err
    code, _, err = run("train", photos, *small(tiny_sd1), "--output", "second", "--init-from", adapter)
    assert code == 0, err


@pytest.mark.slow
def test_a_run_without_an_effect_fails(run: Run, photos: Path, tiny_sd1: Path) -> None:
    still = ["--set", "optimizer.learning_rate=1e-8"]
    code, _, err = run("train", photos, *small(tiny_sd1), *still, "--output", "run")
    assert code == 1
    assert "self-check failed" in err


# -- other commands -------------------------------------------------------------------------------------------------


def test_doctor_exits_with_1_where_something_is_bad(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.cli import doctor

    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Line("device", "bad", "none")])
    assert run("doctor") == (1, "BAD  device  none\nnot ready: device\n", "")
    code, out, _ = run("doctor", "--json")
    assert code == 1 and json.loads(out)["ready"] is False
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Line("device", "ok", "cpu")])
    assert run("doctor")[0] == 0


def test_options_are_listed_with_default_and_bounds(run: Run) -> None:
    code, out, _ = run("options")
    assert code == 0
    assert "adapter.rank = 16  (whole number, 1 to 1024)\n" in out
    assert "adapter.alpha = unset  (number, above 0)\n" in out
    assert "train.seed = 0  (whole number, 0 or more)\n" in out or "train.seed = 0  (whole number, 0 to " in out
    assert 'output.formats = ["kohya"]  (list of kohya, diffusers, peft)\n' in out
    assert all(option.key in out for option in config.options())


def test_the_front_end_says_what_it_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_has", lambda module: False)
    code, _, err = run("ui")
    assert code == 1
    assert err.startswith("lorakit: the front end needs gradio; install it with: ")
    assert {"gradio<7,>=6.31", "filelock>=3.16"} == set(shlex.split(err)[-2:])


def test_the_version_is_that_of_the_package(run: Run) -> None:
    import lorakit

    assert run("--version") == (0, f"lorakit {lorakit.__version__}\n", "")
