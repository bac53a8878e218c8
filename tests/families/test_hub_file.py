"""Tests of one file of a hub repository: only this file is fetched, its header first, and then the cache is used."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import pytest
import safetensors_by_hand
import small_models
import tiny
from hub_server import COMMIT
from refusal import refusal

from lorakit import families
from lorakit.config import ModelConfig
from lorakit.runs import quickstart

NAME = "sub/My Model_v1.0.safetensors"
Hub = Callable[[], list[str]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with complete models in one file each, and with other files."""
    room = tmp_path_factory.mktemp("hub")
    folder = room / "served"
    (folder / "sub").mkdir(parents=True)
    small_models.write(folder / NAME, "sd1", small_models.small("sd1", room / "parts"))
    shutil.copy(folder / NAME, folder / "UPPER.SAFETENSORS")
    flux = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8)}
    safetensors_by_hand.write(folder / "flux.safetensors", flux)
    safetensors_by_hand.write(folder / "lora.safetensors", {"lora_unet_x.lora_down.weight": (8, 8)})
    (folder / "page.safetensors").write_text("<html>")
    for name in ("model.ckpt", "model.gguf", "unet.bin"):
        (folder / name).touch()
    return folder


@pytest.fixture
def requests(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that the hub was asked for."""
    from huggingface_hub import constants

    paths: list[str] = []
    with hub_server.serve(served, paths) as endpoint:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield paths


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        f"org/tiny/{NAME}",
        f"org/tiny/{NAME}@main",
        "https://huggingface.co/org/tiny/resolve/main/sub/My%20Model_v1.0.safetensors?download=true",
        "https://huggingface.co/org/tiny/blob/main/sub/My%20Model_v1.0.safetensors",
    ],
)
def test_one_file_is_fetched_and_then_needs_no_network(
    base: str, requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    assert quickstart.is_hub_id(base) and quickstart.must_be_fetched(base)
    tokenizer = tmp_path / "words" / "tokenizer"
    tiny.save_tokenizer(tokenizer)
    info = families.describe(ModelConfig(base=base, tokenizer=str(tokenizer)))
    assert (info.family, info.title, info.source) == ("sd1", "My Model_v1.0", f"org/tiny/{NAME}@{COMMIT}")
    assert info.notes[0] == f"from the hub: org/tiny/{NAME}@{COMMIT}"
    assert [path.name for path in (tmp_path / "cache").rglob("*.safetensors")] == [Path(NAME).name]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests.clear()
    pinned = families.pin(ModelConfig(base=base)).base
    assert pinned == f"org/tiny/{NAME}@{COMMIT}" and not quickstart.must_be_fetched(base)
    for text in (base, pinned):
        assert families.describe(ModelConfig(base=text, tokenizer=str(tokenizer))).hash == info.hash
    assert requests == []


def test_a_name_in_capitals_is_read_on_the_hub_and_on_disk(requests: list[str], served: Path) -> None:
    assert families.describe("org/tiny/UPPER.SAFETENSORS").family == "sd1"
    assert families.describe(served / "UPPER.SAFETENSORS").family == "sd1"


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("org/tiny/flux.safetensors", "flux.safetensors is a FLUX"),
        ("org/tiny/lora.safetensors", "base lora.safetensors is an adapter (LoRA), not a base model"),
        ("org/tiny/page.safetensors", "base org/tiny/page.safetensors is not a safetensors file: give another one"),
        ("org/tiny/model.ckpt", "base model.ckpt is a pickle"),
        ("org/tiny/unet.bin", "base unet.bin is a pickle"),
        ("org/tiny/model.gguf", "base model.gguf is a GGUF file"),
        ("org/tiny/none.safetensors", "org/tiny has no such file; its .safetensors files: UPPER.SAFETENSORS, "),
        ("org/tiny", "is not in diffusers layout (no model_index.json); give org/tiny/flux.safetensors"),
        ("org/tiny/x.safetensors@v9", "base org/tiny/x.safetensors@v9 has no revision 'v9'"),
        ("org/none/x.safetensors", "x.safetensors is not a file on this machine, and its repository is not on the hub"),
        ("org/gated/x.safetensors", "base org/gated/x.safetensors is gated: accept its terms at http"),
        ("org/expired", 'the hub refuses this machine\'s token (User Access Token "mine" is expired); log in again'),
        ("org/badtoken/x.safetensors", "token (Invalid credentials in Authorization header); log in again with: hf"),
        ("org/forbidden", "the hub refuses it (enable access to public gated repositories): look at http"),
    ],
)
def test_unavailable_files_are_reported_and_nothing_is_fetched(
    base: str, words: str, requests: list[str], tmp_path: Path
) -> None:
    assert words in refusal(base), refusal(base)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".json"]


def test_offline_only_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert refusal("org/tiny/x.safetensors@v1") == (
        "base org/tiny/x.safetensors@v1 is not in the cache and HF_HUB_OFFLINE is set: unset it once; or give a folder "
        "or a file"
    )
