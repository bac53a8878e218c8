"""Publish adapters on the hub: a folder with the file, its model card and sample pictures, and its upload. No torch.

Only what this module lists is published: no path, no name or caption of a photo, and prompts only on request.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lorakit import __version__
from lorakit.config import DataConfig
from lorakit.config.option import suggest
from lorakit.core import foreign_json, image_grid, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import quote
from lorakit.data import captions
from lorakit.families import hub
from lorakit.families.describe import BUNDLED
from lorakit.formats import embeddings, identify, metadata as meta
from lorakit.formats.facts import health
from lorakit.formats.facts.consumers import CONSUMERS
from lorakit.formats.facts.licenses import LICENSES
from lorakit.formats.inspect import Report, inspect
from lorakit.runs.run_folder import RunFolder

log = logging.getLogger("lorakit")

PICTURES = 4
# Hashes of the tensors, which are copied unchanged.
_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
# Bytes copied in one read.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Publication:
    """The files and facts to publish.

    Attributes:
        adapter: path of the adapter file on this machine.
        report: inspection report of the adapter file.
        license: the license's identifier on the hub.
        base: hub id of the base, or "".
        pictures: sample pictures, each with its prompt or "".
        words: word -> file of its embedding.
        checked: whether the run's self-check passed.
        notes: messages about the base and its license that were not checked or do not match.
    """

    adapter: Path
    report: Report
    license: str
    base: str = ""
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    words: dict[str, Path] = field(default_factory=dict)
    checked: bool = False
    notes: list[str] = field(default_factory=list)


def push_to_hub(
    source: str | Path,
    repo: str,
    *,
    license: str,
    base_model: str = "",
    prompts: bool = False,
    public: bool = False,
    replace: bool = False,
) -> str:
    """Upload an adapter, its model card and sample pictures to a hub repository. Return the address of the commit.

    Other files of the repository do not change. A repository that does not exist is created as a private one.

    Args:
        source: a run folder, or an adapter file.
        repo: `owner/name`.
        license: license of the adapter, as the hub's identifier. Only the adapter's author can choose it.
        base_model: hub id of the base, needed if the file does not record it.
        prompts: whether the card lists the prompts of the pictures.
        public: whether to make the repository public, or to accept that it is public.
        replace: whether to overwrite files of the same names.

    Raises:
        LorakitError: there is no adapter, the base is of another family, a file of the same name exists, or the hub
            refuses the upload.
    """
    publication = gather(source, license=license, base_model=base_model, prompts=prompts, ask=True)
    for line in publication.notes:
        log.warning("%s", line)
    return send(publication, repo, public=public, replace=replace)


def send(publication: Publication, repo: str, *, public: bool = False, replace: bool = False) -> str:
    """Upload the result of `gather` to a repository; see `push_to_hub`."""
    with tempfile.TemporaryDirectory(prefix="lorakit-push-") as folder:
        write(publication, repo, Path(folder))
        return _upload(Path(folder), repo, public=public, replace=replace)


def gather(
    source: str | Path,
    *,
    license: str,
    base_model: str = "",
    prompts: bool = False,
    ask: bool = False,
) -> Publication:
    """Collect the files to publish of a run or a file; see `push_to_hub`.

    Args:
        ask: whether to ask the hub for the base's family and license; otherwise only the local cache is read.

    Raises:
        LorakitError: there is no adapter file, the hub does not know the license, or the base does not match the
            adapter.
    """
    if license not in LICENSES:
        raise LorakitError(
            "--license {license!r}: give the adapter's license as the hub names it{hint}: "
            "apache-2.0, cc-by-4.0, creativeml-openrail-m, openrail++ ...; other, where it has no "
            "name for it",
            license,
            suggest(license, LICENSES),
        )
    adapter = _adapter(Path(source))
    report = inspect(adapter)
    if report.kind != "adapter" or report.damage:
        raise LorakitError(
            "{file}: {problem}; give an adapter file",
            adapter.name,
            report.damage or Message("this is {description}", report.description),
        )
    base_id = hub.parse(base_model or report.metadata.get("lorakit.base_source", ""))
    if base_model and (base_id is None or Path(base_model).exists()):
        raise LorakitError("--base-model {name}: give a hub id, owner/name", base_model)
    notes = [] if base_id is None else _compare_base(report, base_id.name, not base_model, license, ask)
    run = RunFolder(adapter.parent)
    pictures: list[tuple[Path, str]] = []
    if run.config_file.is_file():
        steps = sorted(run.sample_grids())
        pictures = [(path, _prompt(path) if prompts else "") for path in run.sample_pictures(steps[-1] if steps else 0)]
    elif preview := next((file for end in meta.PREVIEWS if (file := adapter.with_suffix(end)).is_file()), None):
        pictures = [(preview, "")]
    return Publication(
        adapter,
        report,
        license,
        base_id.name if base_id else "",
        pictures[:PICTURES],
        embeddings.word_files(adapter, report.metadata),
        _passed(run),
        notes,
    )


def write(publication: Publication, repo: str, folder: Path) -> list[Path]:
    """Write all files of a publication into an empty folder. Return their paths.

    Raises:
        LorakitError: the folder is not empty or cannot be written, or `repo` is not a valid repository name.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise LorakitError("--repo {name}: give a repository of the hub as owner/name", repo)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise LorakitError("{folder} is not an empty folder: name another one", folder)
    try:
        (folder / "images").mkdir(parents=True)
        _copy_clean(publication.adapter, folder / publication.adapter.name)
        for word, path in publication.words.items():
            (folder / "embeddings").mkdir(exist_ok=True)
            _copy_clean(path, folder / "embeddings" / f"{word}.safetensors")
        for number, (path, _) in enumerate(publication.pictures, 1):
            with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as picture:
                pixels = picture.convert("RGB")
            pixels.info.clear()  # remove the recipe and all other metadata
            pixels.save(folder / "images" / f"{number:02d}.png")
        (folder / "README.md").write_text(card(publication, repo), encoding="utf-8", newline="\n")
    except OSError as error:
        raise LorakitError("{file}: cannot be written ({reason})", folder, error.strerror or error) from None
    return sorted(path for path in folder.rglob("*") if path.is_file())


def card(publication: Publication, repo: str) -> str:
    """The text of the model card, README.md."""
    from huggingface_hub import ModelCardData

    report, name = publication.report, publication.adapter.stem
    prompts = [(number, prompt) for number, (_, prompt) in enumerate(publication.pictures, 1) if prompt]
    widget = [{"text": prompt, "output": {"url": f"images/{number:02d}.png"}} for number, prompt in prompts]
    data = ModelCardData(
        license=publication.license,
        base_model=publication.base or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "text-to-image", "diffusers", "lorakit"],
        instance_prompt=report.trigger or None,
        widget=widget or None,
    )
    rows = "\n".join(f"| {label} | {value} |" for label, value in _facts(publication) if value)
    pictures = " ".join(
        f"![sample {number}](images/{number:02d}.png)" for number in range(1, len(publication.pictures) + 1)
    )
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {name}", pictures, f"| | |\n| --- | --- |\n{rows}"]
    parts += [_usage(publication, repo), f"Written by lorakit {__version__}."]
    return "\n\n".join(filter(None, parts)) + "\n"


def _facts(publication: Publication) -> Iterator[tuple[str, str]]:
    """Rows of the card's table of facts."""
    report, facts = publication.report, publication.report.metadata
    title = registry.version_of(report.family).title if report.family else ""
    link = f"[{publication.base}](https://huggingface.co/{publication.base})" if publication.base else ""
    yield "Adapter for", report.only or title
    yield "Base", link or _code(re.split(r"[\\/]", facts.get("ss_sd_model_name", ""))[-1])
    trigger, noun = health.trigger_and_class(report.trigger, facts)
    yield "Trigger", _code(trigger)
    yield "Class", _code(noun)
    ranks = sorted({rank for component in report.components.values() for rank in component.ranks})
    yield "Method", report.method + (f", rank {', '.join(f'{rank:g}' for rank in ranks)}" if ranks else "")
    photos, side = facts.get("ss_num_train_images", ""), facts.get("modelspec.resolution", "")
    yield "Photos", (f"{photos}, at {side}" if side else photos) + (", not published" if photos else "")
    rate, optimizer = facts.get("ss_learning_rate", ""), facts.get("ss_optimizer", "")
    steps = facts.get("ss_steps", "")
    length = f"{steps} step{'s'[: steps != '1']}" if steps else ""
    yield "Training", ", ".join(filter(None, [length, _code(optimizer), rate and f"rate {rate}"]))
    yield "Precision", report.dtype
    readers = [CONSUMERS[key].title for key, reading in report.readers.items() if reading.complete]
    yield "Read whole by", "" if report.only else ", ".join(readers)
    yield "Checked", "the file was loaded and compared with the trained weights" if publication.checked else ""
    yield "License", publication.license


def _usage(publication: Publication, repo: str) -> str:
    """The section on how to use the adapter in other programs."""
    report, file, base = publication.report, publication.adapter.name, publication.base
    prompt = _example(report)
    if report.only and not base:
        return f"""## Use

It fits {report.only} only, so other programs cannot use it. With lorakit:

```
lorakit sample {quote(file)} --prompt {quote(prompt)}
```"""
    words = " and those in `embeddings/` into its embeddings" if publication.words else ""
    trigger = f", and write {_code(report.trigger)} into the prompt" if report.trigger else ""
    title = registry.version_of(report.family).title if report.family else "the"
    named = _code(re.split(r"[\\/]", report.metadata.get("ss_sd_model_name", ""))[-1])
    was = f"; it was trained on {named}" if named else ""
    explained = f"# BASE: the hub id, or the folder on your disk, of a {title} model{was.replace('`', '')}\n"
    return f"""## Use

Web UIs and ComfyUI: put `{file}` into the program's folder of LoRA files{words}{trigger}.

```python
from diffusers import DiffusionPipeline

{"" if base else explained}pipe = DiffusionPipeline.from_pretrained({base or "BASE"!r})
pipe.load_lora_weights({repo!r}, weight_name={file!r})
pipe({prompt!r}).images[0].save("picture.png")
```"""


def _example(report: Report) -> str:
    """An example prompt in the form of the training prompts."""
    try:
        table = foreign_json.loads_table(report.metadata["lorakit.config"])["data"]
    except (KeyError, ValueError):  # of another program, whose trigger may be a list of tags
        return report.trigger or "a photo"
    is_style = isinstance(table, dict) and table.get("kind") == "style"
    return captions.instance_prompt(DataConfig(kind="style" if is_style else "subject", name=report.trigger))


def _compare_base(report: Report, base: str, is_recorded: bool, license: str, ask: bool) -> list[str]:
    """Messages about the parts of the base that could not be compared, and about its license if it differs.

    Args:
        is_recorded: whether the run recorded this base.
        ask: whether to ask the hub; otherwise only the local cache is read.

    Raises:
        LorakitError: the base is of another family, the adapter fits only the bundled base, or the hub has no such
            model.
    """
    from huggingface_hub import HfApi, errors

    if report.only and report.metadata.get("ss_sd_model_name") == BUNDLED:
        raise LorakitError(
            "--base-model {base}: {file} fits {only} only: leave --base-model out", base, report.name, report.only
        )
    api, family, terms = HfApi(), None, ""
    try:
        card = api.model_info(base).card_data if ask else None
        terms = str((card and card.get("license")) or "")
        with contextlib.suppress(errors.EntryNotFoundError):  # of a family without a UNet
            api.hf_hub_download(base, "unet/config.json", local_files_only=not ask)
        index = Path(api.hf_hub_download(base, "model_index.json", local_files_only=not ask))
        family = inspect(index.parent).family
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError, LorakitError) as error:  # type: ignore[attr-defined]
        if isinstance(error, errors.RepositoryNotFoundError) and not is_recorded:
            raise LorakitError(
                "--base-model {base}: the hub has no such model, or does not show it to you", base
            ) from None
    if family and report.family and family != report.family:
        mine, other = (registry.version_of(name).title for name in (report.family, family))
        raise LorakitError(
            "--base-model {base}: {file} is for {mine}, and that is a {other} model", base, report.name, mine, other
        )
    lines: list[str] = []
    if not family and not is_recorded:
        lines.append(Message("lorakit did not check whether {base} is a base of that family", base))
    if not terms:
        lines.append(Message("check that the license of {base} permits {license}: lorakit did not", base, license))
    elif terms != license:
        lines.append(Message("{base} has the license {terms}: check that it permits {license}", base, terms, license))
    return lines


def _adapter(source: Path) -> Path:
    """The adapter file of a run, or the file itself."""
    if source.is_dir() and (source / "config.toml").is_file():
        named = source / f"{RunFolder(source).adapter_name}.safetensors"
        source = named if named.is_file() else source
    adapter = identify.adapter_file(source)
    if not adapter.exists():
        raise LorakitError("{path}: there is no such file or run", source)
    if adapter.is_dir():
        way = Message("write one: lorakit export {path} --to kohya", quote(adapter))
        raise LorakitError("{path}: give a finished run or an adapter's .safetensors file; {way}", adapter, way)
    return adapter


def _passed(run: RunFolder) -> bool:
    try:
        return bool(json.loads(run.report_file.read_text(encoding="utf-8"))["passed"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _prompt(picture: Path) -> str:
    """The prompt of a sample picture, read from its recipe."""
    try:
        return str(foreign_json.loads_table(str(image_grid.read(picture).info.get("lorakit"))).get("prompt", ""))
    except ValueError:
        return ""


def _code(text: str) -> str:
    """A user's text for a table cell, escaped so that nothing in it is Markdown."""
    text = " ".join(text.replace("`", "'").replace("|", "/").split())
    return f"`{text}`" if text else ""


def _copy_clean(source: Path, target: Path) -> None:
    """Copy a safetensors file with only the harmless part of its metadata. Of the captions, only the trigger is
    kept."""
    head = safetensors_header.read(source)
    own = {key: value for key, value in head.metadata.items() if key in meta.OF_WEIGHTS or key.startswith(_HASHES)}
    texts = own | meta.harmless(head.metadata)
    if "lorakit.config" not in texts:
        texts.pop("ss_tag_frequency", None)  # other programs write the words of all captions there
    table: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **texts}.items()))}
    for name, info in head.tensors.items():
        offsets = [info.start - head.data_start, info.end - head.data_start]
        table[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    raw = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(len(raw).to_bytes(8, "little") + raw)
        reader.seek(head.data_start)
        shutil.copyfileobj(reader, writer, _CHUNK)


def _upload(folder: Path, repo: str, *, public: bool, replace: bool) -> str:
    """Commit the folder's files to the repository, in addition to its existing files."""
    from huggingface_hub import HfApi, errors, is_offline_mode

    if is_offline_mode():
        raise LorakitError("HF_HUB_OFFLINE is set: unset it once, or look at the files with --dry-run FOLDER")
    api, files = HfApi(), {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        try:
            info = api.model_info(repo)
        except errors.RepositoryNotFoundError:
            api.create_repo(repo, private=not public)
            info = api.model_info(repo)
        if not info.private and not public:
            raise LorakitError("{name} is public: give --public to publish there, or another --repo", repo)
        there = sorted(files & {sibling.rfilename for sibling in info.siblings or []})
        if there and not replace:
            raise LorakitError("{name} has {files} already: give another --repo, or --replace", repo, ", ".join(there))
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Add an adapter", parent_commit=info.sha
        )
        return str(commit.commit_url)
    except (errors.HTTPError, errors.LocalTokenNotFoundError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        raise LorakitError(_refusal(repo, error)) from error


def _refusal(repo: str, error: Exception) -> str:
    """Why the hub does not take it, for a person."""
    from huggingface_hub import constants

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    message = response.headers.get("X-Error-Message", "") if response is not None else ""
    reason = message or next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return Message("{name}: the hub does not know who you are: log in with: hf auth login", repo)
    if status in (403, 404):
        return Message(
            "{name}: the hub does not let this token write there ({reason}): it needs the permission to write",
            repo,
            reason,
        )
    if status in (409, 412):
        return Message("{name} was changed by somebody else just now: try again", repo)
    return Message("{name}: cannot be written at {hub} ({reason}): try again later", repo, constants.ENDPOINT, reason)
