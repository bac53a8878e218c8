"""Tests of uploads to the hub: the adapter, a card and pictures; of the user's data only the trigger."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub.constants
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import lorakit
from lorakit import config as configuration
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.cli.main import main
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.image_grid import PngImagePlugin
from lorakit.formats import metadata, save as export_save
from lorakit.runs import publish
from lorakit.runs.run_folder import RunFolder

SECRETS = ("holiday-pictures", "Geburtstag bei Oma", "ada-private", "aunt on the sofa", "our kitchen")
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


class Info:
    family, prediction_type, title, hash = "sd1", "epsilon", "some-model", "0123abcd"
    source = "org/some-model@0123456789012345678901234567890123456789"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, written by hand."""
    folder = tmp_path_factory.mktemp(SECRETS[2])
    settings = {
        "data.folder": str(folder / SECRETS[0]),
        "data.name": "sks toy",
        "data.instance_prompt": SECRETS[1],
        "sample.prompts": [SECRETS[3]],
        "train.steps": 100,
        "output.folder": str(folder / "run"),
    }
    config = configuration.load(None, settings)
    run = RunFolder.create(config)
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(4, 768, generator=generator), torch.randn(1280, 4, generator=generator), 4.0)
    facts = {"images": 5, "steps": 100, "epochs": 20, "times": (1.7e9, 1.7e9 + 60)}
    texts = metadata.build(config, Info(), name="sks-toy", **facts)
    export_save(AdapterWeights("sd1", "lora", {LAYER: layer}), run.path, "sks-toy", ["kohya"], "fp16", texts)
    (run.path / "sks-toy.json").write_text(json.dumps({"notes": SECRETS[4]}), encoding="utf-8")
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    picture.info = {"lorakit": json.dumps({"prompt": SECRETS[3]}), "parameters": SECRETS[3], "Comment": str(folder)}
    run.save_samples(50, [picture], [SECRETS[3]])
    run.save_samples(100, [picture, picture], [SECRETS[3]] * 2)
    run.write_report([{"name": "kohya", "passed": True, "detail": str(folder)}])
    run.unlock()
    return run.path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, so that tests do not share downloads."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """The folder of an existing repository org/tiny, and the requests that the hub received."""
    (repository := tmp_path / "repository").mkdir()
    (repository / "notes.md").write_text("mine", encoding="utf-8")
    requests: list[str] = []
    with hub_server.serve(repository, requests, private=True) as endpoint:
        at(monkeypatch, endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield repository, requests


def at(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Set the hub's address."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_a_dry_run_writes_what_would_be_sent(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # no request may be sent
    command = ["push", str(run), "--repo", "org/toy", "--license", "openrail++", "--dry-run", str(tmp_path / "out")]
    assert main(command) == 0
    names = ["README.md", "images/01.png", "images/02.png", "sks-toy.safetensors"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    facts = front(card)
    assert facts["license"] == "openrail++" and facts["base_model"] == "org/some-model"
    assert facts["instance_prompt"] == "sks toy" and "widget" not in facts
    for text in ("`sks toy`", "lora, rank 4", "5, at 512x512, not published", "100 steps", "images/02.png"):
        assert text in card, text
    assert "weight_name='sks-toy.safetensors'" in card and "compared with the trained weights" in card
    for name in names:
        content = (tmp_path / "out" / name).read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], name
    for name in names[1:3]:
        assert Image.open(tmp_path / "out" / name).info == {}
    mine, theirs = load_file(run / "sks-toy.safetensors"), load_file(tmp_path / "out" / "sks-toy.safetensors")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert main([*command, "--prompts"]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "prompts"), "--prompts"]) == 0
    facts = front((tmp_path / "prompts" / "README.md").read_text(encoding="utf-8"))
    assert facts["widget"][0] == {"text": SECRETS[3], "output": {"url": "images/01.png"}}


def test_the_license_is_never_guessed(run: Path, capsys) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["push", str(run), "--repo", "org/toy"])
    assert wrong.value.code == 2 and "--license" in capsys.readouterr().err


def test_a_push_keeps_other_files_and_replaces_only_on_request(run: Path, home, capsys) -> None:
    repository, requests = home
    url = lorakit.push_to_hub(run, "org/tiny", license="cc-by-4.0")
    assert url.endswith(hub_server.COMMIT)
    assert (repository / "notes.md").read_text(encoding="utf-8") == "mine"
    assert front((repository / "README.md").read_text(encoding="utf-8"))["license"] == "cc-by-4.0"
    assert (repository / "sks-toy.safetensors").stat().st_size > 2 * 4 * (768 + 1280)
    assert not [path for path in requests if "DELETE" in path]


@pytest.mark.parametrize("replace", [False, True])
def test_files_of_the_same_name_are_replaced_only_on_request(run: Path, home, tmp_path, replace) -> None:
    (tmp_path / "repository" / "README.md").write_text("mine", encoding="utf-8")
    with hub_server.serve(tmp_path / "repository", [], private=True) as endpoint, pytest.MonkeyPatch.context() as patch:
        at(patch, endpoint)
        if replace:
            lorakit.push_to_hub(run, "org/tiny", license="cc-by-4.0", replace=True)
        else:
            with pytest.raises(LorakitError, match="already: give another --repo, or --replace"):
                lorakit.push_to_hub(run, "org/tiny", license="cc-by-4.0")
    assert ((tmp_path / "repository" / "README.md").read_text(encoding="utf-8") == "mine") is not replace


def test_a_new_repository_is_private_and_a_public_one_needs_consent(run: Path, home, tmp_path) -> None:
    lorakit.push_to_hub(run, "org/new", license="cc-by-4.0")
    assert huggingface_hub.HfApi().model_info("org/new").private is True
    lorakit.push_to_hub(run, "org/open", license="cc-by-4.0", public=True)
    assert huggingface_hub.HfApi().model_info("org/open").private is False
    with pytest.raises(LorakitError, match="org/open is public: give --public to publish there"):
        lorakit.push_to_hub(run, "org/open", license="cc-by-4.0")


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("org/expired", "the hub does not know who you are: log in with: hf auth login"),
        ("org/forbidden", "does not let this token write there"),
        ("org/broken", "cannot be written at http"),
    ],
)
def test_the_hubs_reason_for_refusal_is_reported(run: Path, home, repo, message) -> None:
    with pytest.raises(LorakitError, match=message):
        lorakit.push_to_hub(run, repo, license="cc-by-4.0")


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("sks-toy.safetensors", {"license": "My License"}, "give the adapter's license"),
        ("sks-toy.safetensors", {"license": "apache2"}, "as the hub names it .did you mean apache-2.0"),
        ("sks-toy.safetensors", {"base_model": "../x"}, "--base-model ../x: give a hub id"),
        ("nothing.safetensors", {}, "there is no such file or run"),
        ("samples", {}, "give a finished run or an adapter"),
    ],
)
def test_unpublishable_sources_are_refused(run: Path, source, changes, message) -> None:
    with pytest.raises(LorakitError, match=message):
        publish.gather(run / source, **({"license": "mit"} | changes))


@pytest.mark.parametrize(
    ("pipeline", "base_model", "match"),
    [
        ("StableDiffusionXLPipeline", "org/tiny", "is for Stable Diffusion 1, and that is a Stable Diffusion XL model"),
        ("StableDiffusionPipeline", "org/nothing", "the hub has no such model, or does not show it to you"),
    ],
)
def test_a_base_that_does_not_fit_the_adapter_is_refused(
    run: Path, home, hub_cache, pipeline, base_model, match
) -> None:
    repository, requests = home
    (repository / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (repository / "unet").mkdir()
    (repository / "unet/config.json").write_text(json.dumps({"cross_attention_dim": 2048 if "XL" in pipeline else 768}))
    with hub_server.serve(repository, requests, private=True) as endpoint, pytest.MonkeyPatch.context() as patch:
        at(patch, endpoint)
        with pytest.raises(LorakitError, match=match):
            lorakit.push_to_hub(run, "org/tiny", license="mit", base_model=base_model)
    assert not [line for line in requests if "commit" in line]


def test_the_base_and_its_license_are_compared(run: Path, home, hub_cache) -> None:
    repository, requests = home
    (repository / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (repository / "unet").mkdir()
    (repository / "unet/config.json").write_text(json.dumps({"cross_attention_dim": 768}))
    (repository / "card.json").write_text(json.dumps({"license": "creativeml-openrail-m"}))
    with hub_server.serve(repository, requests) as endpoint, pytest.MonkeyPatch.context() as patch:
        at(patch, endpoint)
        notes = [
            publish.gather(run, license=license, base_model="org/tiny", ask=True).notes
            for license in ("mit", "creativeml-openrail-m")
        ]
        assert notes == [["org/tiny has the license creativeml-openrail-m: check that it permits mit"], []]
        requests.clear()
        assert publish.gather(run, license="mit", base_model="org/other").notes == [
            "lorakit did not check whether org/other is a base of that family",
            "check that the license of org/other permits mit: lorakit did not",
        ]
        assert not requests, "a dry run asks nothing"


def small_adapter(folder: Path, **texts: str) -> Path:
    layer = LoraLayer(torch.ones(4, 128), torch.ones(96, 4), 4.0)
    texts = {"lorakit.version": "0", "lorakit.family": "sd1", **texts}
    return export_save(AdapterWeights("sd1", "lora", {LAYER: layer}), folder, "toy", ["kohya"], "fp16", texts)["kohya"]


def test_the_card_of_the_bundled_base_names_no_other_program(tmp_path: Path) -> None:
    file = small_adapter(tmp_path, ss_sd_model_name="pocket", **{"modelspec.trigger_phrase": "sks toy"})
    with pytest.raises(LorakitError, match="fits lorakit's bundled base only: leave --base-model out"):
        publish.gather(file, license="mit", base_model="stabilityai/stable-diffusion-xl-base-1.0")
    text = publish.card(publish.gather(file, license="mit"), "org/toy")
    assert "| Adapter for | lorakit's bundled base |" in text and "Read whole by" not in text
    assert "lorakit sample toy.safetensors" in text and "diffusers import" not in text


@pytest.mark.parametrize(
    ("kind", "name", "prompt"),
    [("subject", "sks toy", "a photo of a sks toy"), ("style", "sks style", "a picture in sks style")],
)
def test_the_cards_code_uses_its_base(tmp_path: Path, kind: str, name: str, prompt: str) -> None:
    config = json.dumps({"data": {"kind": kind, "name": name}})
    texts = {
        "lorakit.config": config,
        "modelspec.trigger_phrase": name,
        "ss_sd_model_name": "C:\\models\\mine.safetensors",
    }
    layer = LoraLayer(torch.ones(4, 768), torch.ones(96, 4), 4.0)
    adapter = AdapterWeights("sd1", "lora", {LAYER: layer})
    file = export_save(adapter, tmp_path, "toy", ["kohya"], "fp16", texts)["kohya"]
    text = publish.card(publish.gather(file, license="mit"), "org/toy")
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    where = "the hub id, or the folder on your disk, of a Stable Diffusion 1 model"
    assert f"\n# BASE: {where}; it was trained on mine.safetensors\n" in code
    assert repr(prompt) in code


def test_offline_and_wrong_names_are_refused(run: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(LorakitError, match="give a repository of the hub as owner/name"):
        lorakit.push_to_hub(run, "toy", license="mit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LorakitError, match="HF_HUB_OFFLINE is set"):
        lorakit.push_to_hub(run, "org/toy", license="mit")


def test_captions_in_other_programs_metadata_are_not_uploaded(tmp_path: Path) -> None:
    tags = {"ss_tag_frequency": json.dumps({"10_oma": {"aunt on the sofa": 3}}), "ss_dataset_dirs": '{"10_oma": {}}'}
    tensors = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(4, 768),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(1280, 4),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.alpha": torch.tensor(4.0),
    }
    save_file(
        tensors, tmp_path / "theirs.safetensors", {**tags, "ss_base_model_version": "sd_v1", "ss_network_dim": "4"}
    )
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", "aunt on the sofa")
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=notes)
    publication = publish.gather(tmp_path / "theirs.safetensors", license="other", base_model="org/base")
    files = publish.write(publication, "org/theirs", tmp_path / "out")
    assert [path.name for path in files] == ["README.md", "01.png", "theirs.safetensors"]
    assert not [path for path in files if b"sofa" in path.read_bytes() or b"10_oma" in path.read_bytes()]
    texts = safetensors_header.read(tmp_path / "out" / "theirs.safetensors").metadata
    assert texts == {"format": "pt", "ss_base_model_version": "sd_v1", "ss_network_dim": "4"}
