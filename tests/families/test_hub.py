"""Tests of bases by hub id: which names are ids, which files are fetched, and that a cached base needs no network."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import tiny_sd3
from hub_server import COMMIT
from PIL import Image

from lorakit import config, families, formats
from lorakit.config import ModelConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.families import hub
from lorakit.training import run as train


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", hub.HubId("owner/name")),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", hub.HubId("stable-diffusion-v1-5/stable-diffusion-v1-5")),
        ("owner/name@fp16", hub.HubId("owner/name", "fp16")),
        ("owner/name.x@refs/pr/3", hub.HubId("owner/name.x", "refs/pr/3")),
        (f"owner/name@{COMMIT}", hub.HubId("owner/name", COMMIT)),
        ("https://huggingface.co/owner/name", hub.HubId("owner/name")),
        ("https://huggingface.co/owner/name/", hub.HubId("owner/name")),
        ("http://hf.co/owner/name.x?library=diffusers", hub.HubId("owner/name.x")),
        ("https://huggingface.co/owner/name/tree/main", hub.HubId("owner/name", "main")),
        ("https://huggingface.co/owner/name/tree/refs/pr/3/", hub.HubId("owner/name", "refs/pr/3")),
        ("huggingface.co/owner/name", hub.HubId("owner/name")),
        ("owner/name/v1-5.safetensors", hub.HubId("owner/name", "main", "v1-5.safetensors")),
        ("owner/name/a b/x_v1.0.SAFETENSORS", hub.HubId("owner/name", "main", "a b/x_v1.0.SAFETENSORS")),
        ("owner/name/x.safetensors@v1.0", hub.HubId("owner/name", "v1.0", "x.safetensors")),
        ("owner/name@refs/pr/2/sub/x.ckpt", hub.HubId("owner/name", "refs/pr/2", "sub/x.ckpt")),
        (
            "https://huggingface.co/owner/name/resolve/main/a/b%20c.safetensors?download=true",
            hub.HubId("owner/name", "main", "a/b c.safetensors"),
        ),
        ("https://hf.co/owner/name/blob/v2/x.safetensors", hub.HubId("owner/name", "v2", "x.safetensors")),
        (
            "https://huggingface.co/o/n.x/blob/refs%2Fpr%2F1/x.safetensors",
            hub.HubId("o/n.x", "refs/pr/1", "x.safetensors"),
        ),
        ("https://huggingface.co/owner/name/tree/main/unet", None),
        ("https://huggingface.co/owner/name/blob/main/README.md", None),
        ("pocket", None),
        ("/models/sd15", None),
        ("./models/sd15", None),
        ("models/sd15/base", None),
        ("models/v1-5.safetensors", None),
        ("models/v1-5.SAFETENSORS", None),
        ("C:\\models\\sd15", None),
    ],
)
def test_hub_ids_are_recognized(text: str, expected: hub.HubId | None) -> None:
    assert hub.parse(text) == expected


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("https://huggingface.co/o/n/tree/main/unet", "is a part of a model: give o/n for the whole model"),
        ("https://huggingface.co/o/n/blob/main/model_index.json", "is a part of a model: give o/n"),
        ("https://huggingface.co/datasets/o/n", "is a link: download the model and give its path"),
        ("https://civitai.com/models/1?modelVersionId=2", "is a link: download the model and give its path"),
    ],
)
def test_other_links_than_repositories_are_refused_with_advice(link: str, words: str) -> None:
    with pytest.raises(LorakitError) as caught:
        families.describe(link)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_below_an_existing_folder_is_not_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LorakitError, match="base models/sd15 does not exist"):
        families.describe("models/sd15")


# -- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `org/tiny` in a cache made by hand; any network access fails the test."""
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(tiny_sd1, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def test_a_cached_base_is_used_and_its_commit_is_reported(cache: Path, tiny_sd1: Path) -> None:
    for text in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        info = families.describe(text)
        assert (info.title, info.source) == ("tiny", f"org/tiny@{COMMIT}")
        assert info.notes == (f"from the hub: org/tiny@{COMMIT}",)
        assert info.hash == families.describe(tiny_sd1).hash
    assert families.pin(ModelConfig(base="org/tiny")).base == f"org/tiny@{COMMIT}"
    for text in ("pocket", str(tiny_sd1)):
        assert families.pin(ModelConfig(base=text)).base == text


@pytest.mark.parametrize(
    "gone", ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer", "../../refs/main"]
)
def test_an_incomplete_base_in_the_cache_is_not_used(cache: Path, gone: str) -> None:
    path = cache / "snapshots" / COMMIT / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(LorakitError) as caught:
        families.describe("org/tiny")
    assert str(caught.value) == (
        "base org/tiny is not in the cache and HF_HUB_OFFLINE is set: unset it once; or give a folder or a file"
    )


def test_a_run_keeps_its_commit_after_the_branch_changes(cache: Path, tmp_path: Path) -> None:
    pinned = families.pin(ModelConfig(base="org/tiny"))
    (cache / "refs" / "main").write_text("f" * 40)
    assert families.describe(pinned).source == f"org/tiny@{COMMIT}"


@pytest.mark.slow
def test_a_run_and_its_adapter_record_the_commit(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(2):
        picture = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "photos" / f"{number}.png")
    options = {
        "model.base": "org/tiny",
        "data.folder": str(tmp_path / "photos"),
        "data.name": "sks toy",
        "data.resolution": 64,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 1,
        "train.validate_at_end": False,
        "sample.at_start": False,
        "sample.at_end": False,
        "sample.steps": 1,
        "sample.prompts": ("a photo of sks toy",),
        "memory.device": "cpu",
        "output.folder": str(tmp_path / "run"),
    }
    result = train.train(config.load(None, options))
    assert config.load(tmp_path / "run" / "config.toml").model.base == f"org/tiny@{COMMIT}"
    metadata = formats.read(result.adapter).metadata
    assert metadata["lorakit.base_source"] == f"org/tiny@{COMMIT}"
    assert "org/tiny" not in metadata["lorakit.config"]


# -- the network: a hub server on this machine ----------------------------------------------------------------------

PROGRAM = """
import json, sys
from lorakit import families
from lorakit.config import ModelConfig
from lorakit.core import registry
from lorakit.core.errors import LorakitError
try:
    info = families.describe(ModelConfig(base=sys.argv[1], t5="without T5" not in sys.argv))
    print(json.dumps([info.source, str(info.path), sorted(p.relative_to(info.path).as_posix()
                      for p in info.path.rglob("*") if p.is_file())]))
except LorakitError as error:
    print(json.dumps(str(error)))
"""


def describe(base: str, endpoint: str, home: Path, *options: str) -> Any:
    """Describe a base in another process, with its own cache and the hub at `endpoint`."""
    env = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PROGRAM, base, *options]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(process.stdout)


@pytest.mark.slow
def test_a_base_is_fetched_once_and_then_needs_no_network(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd1, tmp_path / "served")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "model.ckpt").write_bytes(b"pickle")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    requests: list[str] = []
    with hub_server.serve(folder, requests) as endpoint:
        source, path, names = describe("org/tiny", endpoint, tmp_path / "home")
        assert source == f"org/tiny@{COMMIT}" and Path(path).name == COMMIT
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in names
        left = {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin", "model.ckpt"}
        assert not left & set(names)
        assert requests
        requests.clear()
        assert describe("org/tiny", endpoint, tmp_path / "home") == [source, path, names]
        assert requests == []
    # The server is stopped.
    assert describe("org/tiny", endpoint, tmp_path / "home") == [source, path, names]
    words = describe("org/other", endpoint, tmp_path / "home")
    assert words.startswith(f"base org/other is not in the cache and cannot be fetched from {endpoint} (")
    assert words.endswith("try again later; or give a folder or a file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("org/none", "base org/none is not on the hub, or is private: look at {}/org/none, and log in"),
        ("org/gated", "base org/gated is gated: accept its terms at {}/org/gated, and log in with: hf auth login"),
        ("org/tiny@v9", "base org/tiny@v9 has no revision 'v9': look at {}/org/tiny"),
        ("org/broken", "base org/broken is not in the cache and cannot be fetched from {}"),
    ],
)
def test_the_reason_for_a_failed_download_is_reported(base: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    with hub_server.serve(tmp_path / "served", []) as endpoint:
        message = describe(base, endpoint, tmp_path / "home")
        assert message.startswith(words.format(endpoint)) and message.endswith("or give a folder or a file")
        assert "\n" not in message


FLUX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
REFINER = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "scheduler", "words", "count"),
    [
        (FLUX, {}, "base org/tiny is a FLUX.1 model; lorakit trains ", 1),
        (REFINER, {}, "without text_encoder, as SDXL's refiner is: give the base model instead", 1),
        ({"_class_name": "StableDiffusionXLPipeline"}, EDM, "base org/tiny was trained with EDM's noise", 2),
    ],
    ids=["flux", "refiner", "edm"],
)
def test_unsupported_models_are_refused_before_weights_are_fetched(
    index: dict[str, Any], scheduler: dict[str, Any], words: str, count: int, tmp_path: Path
) -> None:
    files = {"model_index.json": json.dumps(index), "scheduler/scheduler_config.json": json.dumps(scheduler)}
    for part, stem in registry.weight_stems().items():
        files |= {f"{part}/config.json": "{}", f"{part}/{stem}.safetensors": "weights"}
    for name, content in files.items():
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    requests: list[str] = []
    with hub_server.serve(tmp_path / "served", requests) as endpoint:
        refusal = describe("org/tiny", endpoint, tmp_path / "home")
    assert words in refusal, refusal
    assert not [path for path in requests if path.endswith(".safetensors")]
    assert any("model_index.json" in path for path in requests)
    assert any("scheduler_config.json" in path for path in requests) == (count > 1)


@pytest.mark.slow
def test_t5_is_not_fetched_if_it_is_disabled(tmp_path: Path) -> None:
    """Without T5 its files are not fetched; later the same repository is fetched with T5."""
    tiny_sd3.save_sd3(tmp_path / "served")
    requests: list[str] = []
    with hub_server.serve(tmp_path / "served", requests) as endpoint:
        describe("org/tiny", endpoint, tmp_path / "home", "without T5")
        fetched = [path for path in requests if "/resolve/" in path]
        assert any("transformer/" in path for path in fetched)
        assert not any("text_encoder_3" in path or "tokenizer_3" in path for path in fetched)
        describe("org/tiny", endpoint, tmp_path / "home")
    assert any("text_encoder_3/model.safetensors" in path for path in requests)


@pytest.mark.parametrize("t5", [True, False])
def test_a_cached_base_with_a_transformer_is_complete_with_t5_or_without(cache: Path, tmp_path: Path, t5: bool) -> None:
    shutil.rmtree(cache / "snapshots" / COMMIT)
    tiny_sd3.save_sd3(cache / "snapshots" / COMMIT, t5=t5)
    assert families.describe("org/tiny").family == "sd3"
    folder = cache / "snapshots" / COMMIT
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert set(hub.base_files("org/tiny", files)) == set(files)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(LorakitError, match="is not in the cache"):
        families.describe("org/tiny")


def test_only_needed_files_of_a_repository_are_fetched() -> None:
    stem, text = "diffusion_pytorch_model", "model"
    names = [
        *("README.md", "model_index.json", "v1-5.safetensors", "v1-5.ckpt", "safety_checker/model.safetensors"),
        *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
        *(f"unet/{name}" for name in ("config.json", f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin")),
        *(f"vae/{name}" for name in ("config.json", f"{stem}.safetensors", f"{stem}.bin")),
        *(f"text_encoder/{text}-0000{n}-of-00002.safetensors" for n in (1, 2)),
        *("text_encoder/model.safetensors.index.json", "text_encoder/config.json", "text_encoder/flax_model.msgpack"),
    ]
    assert set(names) - set(hub.base_files("org/x", names)) == {
        *("README.md", "v1-5.safetensors", "v1-5.ckpt", "safety_checker/model.safetensors"),
        *(f"unet/{stem}.safetensors", f"unet/{stem}.bin", f"vae/{stem}.bin", "text_encoder/flax_model.msgpack"),
    }
    with pytest.raises(LorakitError, match=r"not in diffusers layout .*; give org/x/v1-5\.safetensors$"):
        hub.base_files("org/x", ["v1-5.safetensors", "README.md"])
    ways = {
        "org/x": r"only pickles \(unet/.*\.bin\): try org/x@refs/pr/1, where the hub's bot often",
        "org/x@refs/pr/1": (r"only pickles \(unet/.*\.bin\): download it and run: lorakit convert FOLDER$"),
    }
    for title, words in ways.items():
        with pytest.raises(LorakitError, match=r"has no unet/diffusion_pytorch_model\.safetensors, " + words):
            hub.base_files(title, ["model_index.json", f"unet/{stem}.bin"])
    with pytest.raises(LorakitError, match=r"has no unet/diffusion_pytorch_model\.safetensors, only weights that"):
        hub.base_files("org/x", ["model_index.json", "unet/diffusion_flax_model.msgpack"])
