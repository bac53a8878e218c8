"""Tests of the order in which CLIP's tokenizer is found for a single file without one."""

import gzip
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import small_models
import tiny
import torch
import transformers
from PIL import Image

from lorakit import config, families
from lorakit.cli import main as cli
from lorakit.config import ModelConfig
from lorakit.core.errors import LorakitError
from lorakit.families import clip_tokenizer
from lorakit.runs.preflight import preflight

FAMILIES = ("sd1", "sd2", "sdxl")
PINNED = f"models--openai--clip-vit-large-patch14/snapshots/{clip_tokenizer.REVISION}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a single file without files beside it."""
    files_of = {}
    for family in FAMILIES:
        room = tmp_path_factory.mktemp(family)
        pipeline = small_models.small(family, room / "parts")
        (room / "alone").mkdir()
        files_of[family] = small_models.write(room / "alone" / f"{family}.safetensors", family, pipeline)
    return files_of


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that is offline and has no tokenizer; returns its Hugging Face cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAKIT_HOSTS", raising=False)
    monkeypatch.setattr(clip_tokenizer, "PACKAGES", {})
    return tmp_path / "hub"


@pytest.fixture
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the expected vocabulary of CLIP to that of the tests' tokenizer."""
    monkeypatch.setattr(clip_tokenizer, "WORDS", 523)
    monkeypatch.setattr(clip_tokenizer, "MERGES", len(tiny.MERGES))


@pytest.fixture
def hub(small_clip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with CLIP's repository; yields the paths that it was asked for."""
    from huggingface_hub import constants

    served = tmp_path / "served"
    tiny.save_tokenizer(served)
    (served / "model.safetensors").write_bytes(b"1.7 GB")
    requests: list[str] = []
    with hub_server.serve(served, requests, clip_tokenizer.REPOSITORY, clip_tokenizer.REVISION) as endpoint:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield requests


def settings(base: Path, tmp_path: Path, **changes: Any) -> config.Config:
    photos = tmp_path / "photos"
    if not photos.exists():
        photos.mkdir()
        for number in range(2):
            Image.effect_noise((64, 64), 40 + 20 * number).convert("RGB").save(photos / f"{number}.png")
    options = {
        "model.base": str(base),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "train.steps": 1,
        "train.validate_at_end": False,
        "sample.at_start": False,
        "sample.steps": 1,
        "sample.prompts": ("a photo of sks toy",),
        "memory.device": "cpu",
        "output.folder": str(tmp_path / "run"),
    }
    return config.load(None, options | changes)


# -- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_check_reports_the_download_and_a_run_fetches_it_once(
    family: str, files: dict[str, Path], hub: list[str], tmp_path: Path
) -> None:
    answer = preflight(settings(files[family], tmp_path))
    assert not answer.problems and hub == []
    assert clip_tokenizer.TO_FETCH in answer.lines()
    assert any("tokens of the texts are not counted" in line for line in answer.lines())
    ready = preflight(settings(files[family], tmp_path), fetch=True).or_raise()
    assert clip_tokenizer.FROM_HUB in ready.lines() and clip_tokenizer.TO_FETCH not in ready.lines()
    got = {path.rpartition("/")[2] for path in hub if "/resolve/" in path}
    assert got == {"vocab.json", "merges.txt"}
    assert all(item.tokens for item in ready.report.items)
    hub.clear()
    loaded = families.load(families.describe(str(files[family])), "cpu", torch.float32)
    assert not [path for path in hub if "clip-vit" in path]
    # Each encoder has its own padding token, and no text contains that token.
    pads = [tiny.SPECIAL[1]] if family == "sd1" else ["!"] if family == "sd2" else [tiny.SPECIAL[1], "!"]
    rows = loaded.tokens(["sks!"])
    words = json.loads((tmp_path / "served" / "vocab.json").read_text(encoding="utf-8"))
    for ids, pad in zip(rows, pads, strict=True):
        expected = [words[word] for word in (tiny.SPECIAL[0], "sks</w>", "!</w>", tiny.SPECIAL[1])]
        assert ids[0].tolist() == expected + [words[pad]] * (77 - len(expected))


@pytest.mark.slow
def test_a_single_file_without_a_tokenizer_trains_and_draws(
    files: dict[str, Path], hub: list[str], tmp_path: Path
) -> None:
    from lorakit.training import run

    messages: list[str] = []
    size = {"data.resolution": 128}  # at 64 px the middle block has one position, so its attention learns nothing
    result = run.train(
        settings(files["sd1"], tmp_path, **size), listeners=[lambda event: messages.append(str(event.facts))]
    )
    assert all(finding.passed for finding in result.findings)
    assert any(clip_tokenizer.FROM_HUB in line for line in messages)
    arguments = ["--base", str(files["sd1"]), "--set", "sample.steps=1", "--prompt", "sks toy"]
    assert (
        cli.main(["sample", str(result.adapter), *arguments, "--size", "64", "--output", str(tmp_path / "drawn")]) == 0
    )


def test_an_unreachable_hub_and_wrong_files_are_reported(
    files: dict[str, Path], hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = families.describe(str(files["sd1"]))
    shutil.rmtree(tmp_path / "served")
    with monkeypatch.context() as patch:
        from huggingface_hub import constants

        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        patch.setattr(time, "sleep", lambda _: None)  # the wait between two attempts
        with pytest.raises(
            LorakitError, match=r"^base sd1\.safetensors has no .* cannot be fetched from http://127"
        ) as e:
            info.tokenizer()
    assert "\n" not in str(e.value) and str(e.value).endswith(clip_tokenizer.WAYS)
    monkeypatch.setattr(clip_tokenizer, "WORDS", 600)
    with pytest.raises(LorakitError, match=r"knows 523 words where its text encoder has 600: set model\.tokenizer"):
        clip_tokenizer.fetch("x", 600)


@pytest.mark.slow
def test_offline_check_train_and_sample_name_both_remedies(
    small_clip: None, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"base sd1.safetensors has no tokenizer with it, and HF_HUB_OFFLINE is set: {clip_tokenizer.WAYS}"
    for fetch in (False, True):
        assert preflight(settings(files["sd1"], tmp_path), fetch=fetch).problems == (words,)
    arguments = ["--base", str(files["sd1"]), "--subject", "sks toy", "--set", "memory.device=cpu"]
    for command in ("check", "train"):
        assert cli.main([command, str(tmp_path / "photos"), *arguments]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(LorakitError) as caught:
        families.load(families.describe(str(files["sd1"])), "cpu", torch.float32)
    assert str(caught.value) == words


def test_a_text_encoder_with_another_vocabulary_needs_its_own_tokenizer() -> None:
    assert "reads 523 words where CLIP's" in str(clip_tokenizer.missing("x", 523))
    assert clip_tokenizer.missing("x", clip_tokenizer.WORDS + 2) == (
        "base x reads 49410 words where CLIP's tokenizer has 49408: set model.tokenizer"
    )


# -- this machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (PINNED, ""),
        ("models--openai--clip-vit-base-patch32/snapshots/abc", "Hugging Face's cache"),
        ("models--runwayml--stable-diffusion-v1-5/snapshots/abc/tokenizer", "Hugging Face's cache"),
        ("models--stabilityai--stable-diffusion-2-1/snapshots/abc/tokenizer", "Hugging Face's cache"),
    ],
)
def test_hugging_faces_cache_is_searched(place: str, words: str, files: dict[str, Path], bare: Path) -> None:
    tiny.save_tokenizer(bare / place, "!" if "2-1" in place else tiny.SPECIAL[1])
    tiny.save_tokenizer(bare / "models--a--other" / "snapshots" / "abc", size=600)
    (bare / "models--a--broken" / "snapshots" / "abc").mkdir(parents=True)
    (bare / "models--a--broken" / "snapshots" / "abc" / "vocab.json").write_text("{")
    (bare / "models--a--broken" / "snapshots" / "abc" / "merges.txt").write_text("")
    info = families.describe(str(files["sdxl"]))
    assert info.tokenizers == dict.fromkeys(("tokenizer", "tokenizer_2"), bare / place)
    assert info.notes[-1] == (f"tokenizer: CLIP's, from {words} ({bare / place})" if words else clip_tokenizer.FROM_HUB)
    assert not families.unsuited(info, config.from_tables({"train": {"steps": 1}}, {}))


@pytest.mark.parametrize(
    "place",
    [
        "comfy/sd1_tokenizer",
        "ComfyUI/comfy/sd1_tokenizer",
        "backend/huggingface/runwayml/stable-diffusion-v1-5/tokenizer",
        "webui/backend/huggingface/stabilityai/stable-diffusion-xl-base-1.0/tokenizer",
        "hub/models--openai--clip-vit-large-patch14/snapshots/abc",
    ],
)
def test_the_tokenizer_is_found_in_another_programs_folder(
    place: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_tokenizer(tmp_path / "program" / place)
    named = ModelConfig(base=str(files["sd1"]), tokenizer=str(tmp_path / "program"))
    assert families.describe(named).tokenizer() == tmp_path / "program" / place
    monkeypatch.setenv("LORAKIT_HOSTS", f"{tmp_path / 'nowhere'}:{tmp_path / 'program'}")
    info = families.describe(str(files["sd1"]))
    assert info.tokenizer() == tmp_path / "program" / place
    assert info.notes[-1].startswith(f"tokenizer: CLIP's, from {tmp_path / 'program'} (")


def test_a_tokenizer_beside_the_file_takes_precedence(files: dict[str, Path], bare: Path, tmp_path: Path) -> None:
    tiny.save_tokenizer(bare / PINNED)
    file = tmp_path / "folder" / "x.safetensors"
    tiny.save_tokenizer(file.parent)
    file.symlink_to(files["sd1"])
    assert families.describe(str(file)).tokenizer() == file.parent
    tiny.save_tokenizer(file.parent / "tokenizer", size=600)
    with pytest.raises(LorakitError, match=r"knows 600 words where its text encoder has 523: set model\.tokenizer"):
        families.describe(str(file))


# -- the vocabulary of a package ------------------------------------------------------------------------------------


def archive(folder: Path, merges: int = 60_000) -> Path:
    """Write a file like OpenAI's with invented merges; it has more merges than CLIP reads."""
    folder.mkdir(parents=True)
    letters = tiny.byte_characters()[:250]
    pairs = [f"{a} {b}{end}" for a in letters for b in letters for end in ("", "</w>")]
    path = folder / clip_tokenizer.ARCHIVE
    path.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt"', *pairs[:merges]]).encode()))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["a package", "venv/lib/python3.10/site-packages/open_clip", "venv/Lib/site-packages/clip"]
)
def test_the_vocabulary_of_an_installed_package_is_used(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_tokenizer, "PACKAGES", {"clip": "clip-anytorch", "open_clip": "open_clip_torch"})
    if place == "a package":
        archive(tmp_path / "site" / "clip")
        (tmp_path / "site" / "clip" / "__init__.py").write_text("raise RuntimeError")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
    else:
        archive(tmp_path / "webui" / place)
        monkeypatch.setenv("LORAKIT_HOSTS", str(tmp_path / "webui"))
    folder, note = clip_tokenizer.find("", tmp_path / "x.safetensors", clip_tokenizer.WORDS)
    assert folder is not None and folder.parent == tmp_path / "cache"
    assert note.startswith(
        "tokenizer: CLIP's, from " + ("the package clip-anytorch" if place[2:] == "package" else str(tmp_path))
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (49_408, 49_406, 49_407)
    assert tokenizer("!!", add_special_tokens=False).input_ids == [512 + 1]  # "! !</w>" is the second merge
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(merges) == 1 + clip_tokenizer.MERGES


def test_a_truncated_or_damaged_vocabulary_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a" / "venv" / "Lib" / "site-packages" / "clip", merges=40_000)
    monkeypatch.setattr(clip_tokenizer, "PACKAGES", {"clip": "clip-anytorch"})
    monkeypatch.setenv("LORAKIT_HOSTS", str(tmp_path / "a"))
    for content in (path.read_bytes(), path.read_bytes()[:500], b"no archive"):
        path.write_bytes(content)
        assert clip_tokenizer.find("", tmp_path / "x.safetensors", clip_tokenizer.WORDS)[0] is None


def test_a_vocabulary_of_the_right_size_with_other_merges_is_refused(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path / "t", size=clip_tokenizer.WORDS)
    lines = (merges := tmp_path / "t" / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges.write_text("\n".join(lines[:10]), encoding="utf-8")
    with pytest.raises(LorakitError, match=r"has 9 merges where CLIP's has 48894: set model\.tokenizer"):
        clip_tokenizer.require(tmp_path / "t", clip_tokenizer.WORDS)
    (tmp_path / "t" / "vocab.json").write_text("{")
    with pytest.raises(LorakitError, match="is damaged"):
        clip_tokenizer.require(tmp_path / "t", clip_tokenizer.WORDS)
