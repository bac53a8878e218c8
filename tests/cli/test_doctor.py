"""The findings of `lorakit doctor` for descriptions of machines."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from lorakit.cli import doctor, threads
from lorakit.cli.doctor import Line
from lorakit.core import install
from lorakit.runs import nvidia


def states(lines: list[Line]) -> dict[str, str]:
    return {line.name: line.state for line in lines}


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),  # 8.6 runs machine code for 8.0
        ((8, 9), ["sm_50", "sm_86"], True),
        ((12, 0), ["sm_80", "sm_90"], False),  # the card is newer than this torch
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),  # the driver compiles the PTX for it
        ((12, 0), ["sm_120"], True),
        ((6, 1), ["sm_75", "sm_80"], False),  # this torch no longer supports the card
        ((6, 1), ["compute_75"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], False),
    ],
)
def test_a_torch_without_the_cards_kernels_is_bad(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    lines = doctor.cuda_lines("cuda:0", "card", 2**33, capability, architectures, True)
    assert ("bad" in states(lines).values()) is not runs
    if not runs:
        (bad,) = [line for line in lines if line.state == "bad"]
        assert f"not for sm_{capability[0]}{capability[1]}" in bad.detail
        assert nvidia.INDEX in bad.fix and (nvidia.LEGACY in bad.fix) == (capability < (7, 5))


@pytest.mark.parametrize(("bf16", "state"), [(True, "ok"), (False, "note")])
def test_bf16_is_reported(bf16: bool, state: str) -> None:
    lines = doctor.cuda_lines("cuda:0", "card", 2**33, (7, 5), ["sm_75"], bf16)
    assert states(lines)["cuda:0 bf16"] == state


def installed(versions: dict[str, str]):  # type: ignore[no-untyped-def]
    def find(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return find


@pytest.mark.parametrize(
    ("version", "bounds", "state"),
    [
        ("2.13.0+cpu", "<2.14,>=2.6", "ok"),
        ("2.6.0", "<2.14,>=2.6", "ok"),
        ("2.14.0", "<2.14,>=2.6", "bad"),
        ("2.5.1", "<2.14,>=2.6", "bad"),
        ("2.10.0", "<2.14,>=2.6", "ok"),
        ("5.6", ">=5.6.0", "ok"),
        ("1.0", "==1.0.0", "ok"),
        ("1.0.1", "==1.0", "bad"),
        ("3.0rc1", ">2,<=3", "ok"),
    ],
)
def test_versions_are_compared_with_the_tested_bounds(version: str, bounds: str, state: str) -> None:
    lines = doctor.versions([f"torch{bounds}"], installed({"torch": version}))
    assert states(lines)["torch"] == state
    if state == "bad":
        assert lines[-1].fix == install.command(f"torch{bounds}")
        assert bounds in lines[-1].detail


def test_a_missing_package_is_bad_and_extras_are_not_asked_for() -> None:
    lines = doctor.versions(["peft>=0.21", 'gradio>=6; extra == "ui"'], installed({}))
    assert states(lines) == {"python": "ok", "peft": "bad"}
    assert lines[-1].detail == "missing; lorakit needs >=0.21"


def test_every_extra_that_is_missing_has_its_command() -> None:
    lines = doctor.extras(lambda module: None)
    assert [line.state for line in lines] == ["note"] * len(doctor.optional_extras())
    assert [line.fix for line in lines] == [install.hint(extra) for extra in doctor.optional_extras()]
    details = {line.name: line.detail for line in lines}
    assert details["extra heic"] == "pillow_heif is missing; it is needed only for photos of phones in HEIC"
    assert {line.state for line in doctor.extras(lambda module: object())} == {"ok"}


def test_the_extras_are_those_of_the_package() -> None:
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(doctor.optional_extras()) == set(declared) - {"test", "docs"}
    for extra, (module, _) in doctor.optional_extras().items():
        assert declared[extra][0].replace("-", "_").startswith(module)


def test_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    assert "0 MiB" in doctor.storage(tmp_path)[1].detail
    (tmp_path / "cache" / "latents").mkdir(parents=True)
    (tmp_path / "cache" / "latents" / "one").write_bytes(bytes(3 * 2**20))
    disk, cache = doctor.storage(tmp_path)
    assert "GiB free" in disk.detail
    assert cache.detail == f"{tmp_path / 'cache'}: 3 MiB; it may be deleted"


def test_text_and_json_agree() -> None:
    lines = [Line("a", "ok", "fine"), Line("longer", "bad", "broken", "pip install it"), Line("c", "note", "hm")]
    assert doctor.to_text(lines).splitlines() == [
        "ok   a       fine",
        "BAD  longer  broken",
        "             pip install it",
        "note c       hm",
        "not ready: longer",
    ]
    assert doctor.to_json(lines)["ready"] is False
    assert json.loads(json.dumps(doctor.to_json(lines)))["findings"][1]["fix"] == "pip install it"
    assert doctor.to_text(lines[:1]).endswith("\nready")
    assert doctor.to_json(lines[:1])["ready"] is True


def test_this_machine_is_examined() -> None:
    names = [line.name for line in doctor.examine()]
    assert names[0] == "python"
    assert {"disk", "cache", "extra ui"} <= set(names)
    assert any(name == "device" or name.startswith("cuda") for name in names)


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("", "cpu, 1 thread of 2: the other cores were busy when the command started"),
        ("1", "cpu, 1 thread of 2: OMP_NUM_THREADS is set to 1"),
    ],
)
def test_the_line_of_the_cpu_gives_the_reason_for_fewer_threads_than_cores(monkeypatch, value, detail):
    monkeypatch.setenv(threads.THREADS, value)
    monkeypatch.setattr(doctor, "available_cores", lambda: 2)
    monkeypatch.setattr(nvidia, "has_driver", lambda: False)
    assert doctor.cpu_line(1) == Line("device", "ok", detail)
    assert doctor.cpu_line(2) == Line("device", "ok", "cpu, 2 threads")
