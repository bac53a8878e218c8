"""Bases by hub id (`owner/name`, `owner/name@revision` or `owner/name/file.safetensors`), from the local cache or
downloaded once.

The cache is huggingface_hub's, shared with diffusers. A cached name keeps its commit until another revision is given:
the hub is not asked again, so a run has the same base tomorrow and works offline.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from lorakit.core import install, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.families import weight_files

# Half precision is half the download, and enough for a frozen base.
VARIANTS = ("fp16", "bf16", None)
_REVISION = r"refs/[\w.-]+/[\w.-]+|[\w.-]+"
_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
# One file of a repository; the revision follows the repository or the file.
_FILE = re.compile(
    rf"([\w.-]+/[\w.-]+?)(?:@({_REVISION}))?/([^@]+\.(?:safetensors|ckpt|pt|pth|bin|gguf))(?:@({_REVISION}))?", re.I
)
# Almost a hub id: with an extra word or character, a name of the cache, a subfolder, or another mark before the
# revision.
_LIKE = re.compile(
    r"(?:hf:/?|\w+@hf\.co:|models?/|models--)?([A-Za-z0-9][\w.-]*?) ?(?:/|--) ?([\w.-]+?)(?:\.git)?(?:[/:#?@ ].*)?"
)
# Address in a browser: a repository's page, a folder, or a file.
_LINK = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/([\w.-]+/[\w.-]+)"
    rf"(?:/(?:tree|blob|resolve|raw)/({_REVISION})(?:/([^?#]+?))?)?/?(?:[?#].*)?"
)


@dataclass(frozen=True)
class HubId:
    """`owner/name`, a branch, tag or commit, and the name of a file if one file is meant."""

    name: str
    revision: str = "main"
    file: str = ""

    def at(self, revision: str) -> str:
        """The value of `model.base` for another revision."""
        return f"{self.name}{self.file and '/'}{self.file}@{revision}"

    @property
    def title(self) -> str:
        """The id for messages."""
        return self.at(self.revision).removesuffix("@main")


class Refusal(LorakitError):
    """The reason why the hub has no model; the caller adds the option."""


class Checks(NamedTuple):
    """Functions that refuse a model by its title and small files; larger files are downloaded only after they return.

    Attributes:
        configs: takes a folder with model_index.json, later also with the other configs.
        header: takes the header of a single file, before its tensors are downloaded.
    """

    configs: Callable[[str, Path], object]
    header: Callable[[safetensors_header.Header], object]


def parse(base: str) -> HubId | None:
    """The hub id in `model.base`, or None. A path whose first folder exists and a file name are not hub ids."""
    if link := _LINK.fullmatch(unquote(base)):
        name, revision, file = link.groups()
        name = name.removesuffix(".git")
        return HubId(name, revision or "main", file or "") if not file or _FILE.fullmatch(f"{name}/{file}") else None
    if base.startswith(".") or "\\" in base or Path(base.partition("/")[0]).is_dir():
        return None
    if match := _FILE.fullmatch(base):
        return HubId(match[1], match[2] or match[4] or "main", match[3])
    match = _ID.fullmatch(base)
    return HubId(match[1], match[2] or "main") if match and not base.lower().endswith(".safetensors") else None


def absence(base: str) -> Message:
    """The message for a base that does not exist, with a suggestion."""
    match = _LIKE.fullmatch(base)
    if match and not re.search(r"\.(safetensors|ckpt|gguf)$", base, re.I):
        return Message(
            "base {path} does not exist; as a hub id it is {name}, and {name}@REVISION at another revision",
            base,
            f"{match[1]}/{match[2]}",
        )
    return Message(
        "base {path} does not exist: give a .safetensors file, a folder in diffusers layout or a hub id, owner/name",
        base,
    )


def refuse_name(link: str) -> None:
    """Raise for an empty name and for links, except those to a repository's page or to a model file in it."""
    if not link.strip():
        raise LorakitError("model.base is empty: name a base, or leave it out for the bundled one")
    if "://" not in link:
        return
    if link.startswith("file://"):
        raise LorakitError("base {link} is a link: give its path, {path}", link, unquote(link[len("file://") :]))
    if inside := _LINK.fullmatch(unquote(link)):
        raise LorakitError("base {link} is a part of a model: give {name} for the whole model", link, inside[1])
    raise LorakitError(
        "base {link} is a link: download the model and give its path, or give a hub id, owner/name", link
    )


def find(hub_id: HubId, checks: Checks, without: Collection[str] = ()) -> tuple[Path, str]:
    """The folder or file in the cache, and its commit. The network is used only if the cache lacks it.

    Args:
        without: folders of the repository that are not needed.

    Raises:
        LorakitError: the model, revision or file does not exist, it is gated or not in diffusers layout, or the network
            cannot be reached; or as `checks`.
    """
    try:
        path = cached(hub_id, without) or _fetch(hub_id, checks, without)
    except Refusal as error:
        raise LorakitError("base {problem}; or give a folder or a file", error) from error
    return path, _commit(hub_id, path)


def _commit(hub_id: HubId, path: Path) -> str:
    """The commit of a snapshot in the cache, from its path."""
    return path.parents[hub_id.file.count("/")].name if hub_id.file else path.name


def cached(hub_id: HubId, without: Collection[str] = ()) -> Path | None:
    """The complete snapshot or the file in the cache, or None, without network access."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        path = try_to_load_from_cache(hub_id.name, hub_id.file or "model_index.json", revision=hub_id.revision)
    except errors.HFValidationError:  # such names are invalid on the hub; `_fetch` reports it
        return None
    # The result can also be a marker for "known not to exist".
    if not isinstance(path, str):
        return None
    if hub_id.file:
        return Path(path)
    return Path(path).parent if _complete(Path(path).parent, without) else None


def cached_vae(hub_id: HubId) -> Path | None:
    """The autoencoder of a repository in the cache, or None, without network access."""
    if hub_id.file:
        return cached(hub_id)
    reference = _repository(hub_id) / "refs" / hub_id.revision
    commit = reference.read_text() if reference.is_file() else hub_id.revision
    folder = _repository(hub_id) / "snapshots" / commit
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    with contextlib.suppress(LorakitError):
        return folder / _vae_files(hub_id.title, names)[0]
    return None


def _repository(hub_id: HubId) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{hub_id.name.replace('/', '--')}"


def find_vae(hub_id: HubId) -> tuple[Path, str]:
    """The autoencoder of a repository and its commit, from the cache or the hub.

    Raises:
        LorakitError: as `find`, or the repository has no autoencoder.
    """
    from huggingface_hub import HfApi, errors, is_offline_mode, snapshot_download

    try:
        if hub_id.file:
            path = cached(hub_id) or _fetch(hub_id, Checks(lambda title, folder: None, lambda header: None), ())
            return path, _commit(hub_id, path)
        if there := cached_vae(hub_id):
            return there, there.relative_to(_repository(hub_id) / "snapshots").parts[0]
        if is_offline_mode():
            raise Refusal("{name} is not in the cache and HF_HUB_OFFLINE is set: unset it once", hub_id.title)
        info = HfApi().model_info(hub_id.name, revision=hub_id.revision)
        place, files = _vae_files(hub_id.title, [sibling.rfilename for sibling in info.siblings or []])
        folder = Path(snapshot_download(hub_id.name, revision=hub_id.revision, allow_patterns=files))
        return folder / place, folder.name
    except Refusal as error:
        raise LorakitError("model.vae: {problem}; or give a folder or a file", error) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError, ImportError) as error:  # type: ignore[attr-defined]
        raise LorakitError("model.vae: {problem}; or give a folder or a file", refusal(hub_id, error)) from error


def _vae_files(title: str, names: list[str]) -> tuple[str, list[str]]:
    """The folder or file of the autoencoder among a repository's files, and the files to download."""
    for place in ("", "vae/"):
        for infix in ("", ".fp16", ".bf16"):
            files = [f"{place}config.json", f"{place}diffusion_pytorch_model{infix}.safetensors"]
            if set(files) <= set(names):
                return place, files
    single = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(single) == 1:
        return single[0], single
    raise LorakitError(
        "model.vae: {name} has no VAE in diffusers layout: give {name}/FILE.safetensors; or give a folder or a file",
        title,
    )


def _complete(folder: Path, without: Collection[str]) -> bool:
    """Whether a snapshot has every part that its index names and that a base needs."""
    index = weight_files.read_json(folder / "model_index.json")
    parts = {name for name, classes in index.items() if isinstance(classes, list) and None not in classes} - {*without}
    stems = registry.weight_stems()
    try:
        for name in stems.keys() & parts:
            weight_files.weight_files(folder / name, stems[name])
    except LorakitError:
        return False
    return all((folder / name).is_dir() for name in parts & {*stems, *_folders()})


def _fetch(hub_id: HubId, checks: Checks, without: Collection[str]) -> Path:
    from huggingface_hub import HfApi, errors, is_offline_mode, snapshot_download

    if is_offline_mode():
        raise Refusal("{name} is not in the cache and HF_HUB_OFFLINE is set: unset it once", hub_id.title)
    title = hub_id.title
    try:
        info = HfApi().model_info(hub_id.name, revision=hub_id.revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if hub_id.file:
            return _fetch_file(hub_id, str(info.sha), names, checks)
        small = ["model_index.json"] if "model_index.json" in names else ["config.json", "adapter_config.json"]
        if set(small) & set(names):
            checks.configs(title, Path(snapshot_download(hub_id.name, revision=info.sha, allow_patterns=small)))
        files = [name for name in base_files(title, names) if name.partition("/")[0] not in without]
        configs = [name for name in files if name.endswith(".json")]
        checks.configs(title, Path(snapshot_download(hub_id.name, revision=info.sha, allow_patterns=configs)))
        folder = snapshot_download(hub_id.name, revision=hub_id.revision, allow_patterns=files)
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError, ImportError) as error:  # type: ignore[attr-defined]
        raise Refusal(refusal(hub_id, error)) from error
    return Path(folder)


def _fetch_file(hub_id: HubId, commit: str, names: list[str], checks: Checks) -> Path:
    from huggingface_hub import HfApi, errors, hf_hub_download

    if hub_id.file not in names:
        others = sorted(name for name in names if name.lower().endswith(".safetensors"))
        there = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "") or "none"
        raise Refusal(
            "{name}: {repository} has no such file; its .safetensors files: {files}",
            *(hub_id.title, hub_id.name, there),
        )
    tensors, metadata = {}, {}
    if hub_id.file.lower().endswith(".safetensors"):
        try:
            remote = HfApi().parse_safetensors_file_metadata(hub_id.name, hub_id.file, revision=commit)
        except (errors.SafetensorsParsingError, struct.error):
            raise Refusal("{name} is not a safetensors file: give another one", hub_id.title) from None
        metadata = remote.metadata
        for name, info in remote.tensors.items():
            tensors[name] = safetensors_header.TensorInfo(info.dtype, tuple(info.shape), *info.data_offsets)
    checks.header(safetensors_header.Header(Path(hub_id.file), tensors, metadata, 0))
    return Path(hf_hub_download(hub_id.name, hub_id.file, revision=hub_id.revision))


def refusal(hub_id: HubId, error: Exception) -> str:
    """The reason why the hub does not provide a model, as a message."""
    from huggingface_hub import constants, errors

    title, page = hub_id.title, f"{constants.ENDPOINT}/{hub_id.name}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    message = response.headers.get("X-Error-Message", "") if response is not None else ""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, ImportError) and "socksio" in reason:
        reason = Message("the environment names a SOCKS proxy, which needs: {command}", install.command("socksio"))
    absent = isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError)
    if status == 401 and (
        re.search(r"credential|token|expired", message, re.I) or not isinstance(error, errors.RepositoryNotFoundError)
    ):
        why = Message(
            "{name} cannot be fetched: the hub refuses this machine's token ({why}); log in again with: hf auth login, "
            "or unset HF_TOKEN",
            *(title, message or "it is wrong or expired"),
        )
    elif isinstance(error, errors.GatedRepoError):
        why = Message("{name} is gated: accept its terms at {page}, and log in with: hf auth login", title, page)
    elif absent:
        why = Message(
            "{name} is not a file on this machine, and its repository is not on the hub, or is private: look at "
            "{page}, and log in with: hf auth login"
            if hub_id.file
            else "{name} is not on the hub, or is private: look at {page}, and log in with: hf auth login",
            *(title, page),
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        why = Message("{name} has no revision {revision!r}: look at {page}", title, hub_id.revision, page)
    elif status in (403, 451):
        why = Message(
            "{name} cannot be fetched: the hub refuses it ({why}): look at {page} and the token's permissions",
            *(title, message or reason, page),
        )
    else:
        why = Message(
            "{name} is not in the cache and cannot be fetched from {hub} ({why}): try again later",
            *(title, constants.ENDPOINT, reason),
        )
    return why


def _folders() -> set[str]:
    """Folders without weights, of all families."""
    return {"scheduler", *(part.tokenizer for spec in registry.FAMILIES.values() for part in spec.text_encoders)}


def base_files(title: str, names: Iterable[str]) -> list[str]:
    """The files of a repository that a base needs: one precision of each part's weights, and no pickles.

    Raises:
        LorakitError: it is not in diffusers layout, or has only pickled weights.
    """
    names = list(names)
    if "model_index.json" not in names:
        single = next((name for name in sorted(names) if name.endswith(".safetensors") and "/" not in name), None)
        repository, _, revision = title.partition("@")
        instead = Message("; give {name}", HubId(repository, revision or "main", single).title) if single else ""
        raise LorakitError("base {title} is not in diffusers layout (no model_index.json){instead}", title, instead)
    files = ["model_index.json", *(name for name in names if name.startswith(tuple(f"{f}/" for f in _folders())))]
    for part, stem in registry.weight_stems().items():
        inside = [name for name in names if name.startswith(f"{part}/")]
        if not inside:
            continue
        for variant in VARIANTS:
            infix = rf"\.{variant}" if variant else ""
            pattern = rf"{part}/{stem}(\.safetensors\.index{infix}\.json|{infix}(-\d+-of-\d+)?\.safetensors)"
            weights = [name for name in inside if re.fullmatch(pattern, name)]
            if weights:
                break
        else:
            raise LorakitError(_unread(title, f"{part}/{stem}.safetensors", inside))
        files += [*weights, *(name for name in inside if name == f"{part}/config.json")]
    return files


def _unread(title: str, missing: str, names: Iterable[str]) -> str:
    """The message for a part of a repository without a .safetensors file, with alternatives."""
    pickle = next((name for name in sorted(names) if name.endswith((".bin", ".ckpt"))), None)
    if pickle is None:
        return Message("base {name} has no {file}, only weights that are not read here", title, missing)
    repository, _, revision = title.partition("@")
    tried = revision.startswith("refs/pr/")
    offer = (
        ""
        if tried
        else Message("try {repository}@refs/pr/1, where the hub's bot often offers .safetensors, or ", repository)
    )
    return Message(
        "base {title} has no {missing}, only pickles ({pickle}): {offer}download it and run: lorakit convert FOLDER",
        title,
        missing,
        pickle,
        offer,
    )
