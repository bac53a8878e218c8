"""Bases by hub id, `owner/name` or `owner/name@revision`: taken from the local cache, fetched once where they are not.

The cache is huggingface_hub's own, shared with diffusers. What a name stood for when it was fetched is what it stands
for until another revision is asked for: nothing is looked up, so a run is the same tomorrow and works offline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lorakit.core.errors import LorakitError
from lorakit.families import weight_files

COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
COMPONENTS |= {"transformer": "diffusion_pytorch_model"}
COMPONENTS |= {"text_encoder": "model", "text_encoder_2": "model", "text_encoder_3": "model"}
FOLDERS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
# Half precision is half the download and all that a frozen base needs.
VARIANTS = ("fp16", "bf16", None)
_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
# A repository's page as the browser shows it, and one of its files.
_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/tree/([\w./-]+?))?/?(?:[?#].*)?"
)
_FILE_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/(?:blob|resolve|raw)/.*")


@dataclass(frozen=True)
class HubId:
    """`owner/name`, and a branch, a tag or a commit."""

    name: str
    revision: str = "main"


def parse(base: str) -> HubId | None:
    """The hub id that a base is, or None: a path whose first folder is there, and a file's name, are none."""
    if page := _PAGE.fullmatch(base):
        return HubId(page[1], page[2] or "main")
    match = _ID.fullmatch(base)
    file = base.lower().endswith(".safetensors")
    if not match or base.startswith(".") or file or Path(base.partition("/")[0]).is_dir():
        return None
    return HubId(match[1], match[2] or "main")


def refuse_link(link: str) -> None:
    """Raise for a link, none of which is a base but a repository's page."""
    if "://" not in link:
        return
    if file := _FILE_PAGE.fullmatch(link):
        raise LorakitError(
            f"base {link} is one file: download it and give its path, or give {file[1]} for the whole model"
        )
    raise LorakitError(f"base {link} is a link: download the model and give its path, or give a hub id, owner/name")


def find(hub_id: HubId, check: Callable[[str, Path], object] = lambda title, folder: None) -> tuple[Path, str]:
    """Folder in the cache, and the commit that it is of. Only where the cache lacks it is the network asked.

    Args:
        check: refuses a model by its title and a folder with model_index.json, and later the other configs; nothing
            larger is fetched before it returns.

    Raises:
        LorakitError: there is no such model or revision, it is gated, it is not in diffusers layout, or the network
            cannot be reached; or as `check` does.
    """
    folder = cached(hub_id) or _fetch(hub_id, check)
    return folder, folder.name


def cached(hub_id: HubId) -> Path | None:
    """The complete snapshot in the cache, or None. The network is not asked."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        index = try_to_load_from_cache(hub_id.name, "model_index.json", revision=hub_id.revision)
    except errors.HFValidationError:  # the hub has no such names; `_fetch` says so
        return None
    # Beside a path and None there is a mark for "known not to exist".
    return Path(index).parent if isinstance(index, str) and _complete(Path(index).parent) else None


def _complete(folder: Path) -> bool:
    """Whether a snapshot has every part that its index names and a base needs."""
    index = weight_files.read_json(folder / "model_index.json")
    parts = {name for name, classes in index.items() if isinstance(classes, list) and None not in classes}
    try:
        for name in COMPONENTS.keys() & parts:
            weight_files.weight_files(folder / name, COMPONENTS[name])
    except LorakitError:
        return False
    return all((folder / name).is_dir() for name in parts & {*COMPONENTS, *FOLDERS})


def _fetch(hub_id: HubId, check: Callable[[str, Path], object]) -> Path:
    from huggingface_hub import HfApi, errors, is_offline_mode, snapshot_download

    title = f"{hub_id.name}@{hub_id.revision}" if hub_id.revision != "main" else hub_id.name
    if is_offline_mode():
        raise LorakitError(
            f"base {title} is not in the cache and HF_HUB_OFFLINE is set: unset it once, or give a folder or a file"
        )
    try:
        info = HfApi().model_info(hub_id.name, revision=hub_id.revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if "model_index.json" in names:
            index = snapshot_download(hub_id.name, revision=info.sha, allow_patterns=["model_index.json"])
            check(title, Path(index))
        files = base_files(title, names)
        configs = [name for name in files if name.endswith(".json")]
        check(title, Path(snapshot_download(hub_id.name, revision=info.sha, allow_patterns=configs)))
        folder = snapshot_download(hub_id.name, revision=hub_id.revision, allow_patterns=files)
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        _refuse(hub_id, title, error)
    return Path(folder)


def _refuse(hub_id: HubId, title: str, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{hub_id.name}"
    if isinstance(error, errors.GatedRepoError):
        why = f"is gated: accept its terms at {page} and log in with: hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"is not on the hub, or is private: look at {page}, and log in with: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"has no revision {hub_id.revision!r}: look at {page}"
    else:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        why = f"is not in the cache and cannot be fetched from {constants.ENDPOINT} ({reason}): try again later"
    raise LorakitError(f"base {title} {why}; or give a folder or a file") from error


def base_files(title: str, names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a base needs: one precision of each part's weights, and no pickles.

    Raises:
        LorakitError: it is not in diffusers layout, or has pickled weights only.
    """
    names = list(names)
    if "model_index.json" not in names:
        single = next((name for name in sorted(names) if name.endswith(".safetensors") and "/" not in name), None)
        instead = f"; download {single} and give that file" if single else ""
        raise LorakitError(f"base {title} is not in diffusers layout (no model_index.json){instead}")
    files = ["model_index.json", *(name for name in names if name.startswith(tuple(f"{f}/" for f in FOLDERS)))]
    for part, stem in COMPONENTS.items():
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
            raise LorakitError(f"base {title} has no {part}/{stem}.safetensors, only weights that are not read here")
        files += [*weights, *(name for name in inside if name == f"{part}/config.json")]
    return files
