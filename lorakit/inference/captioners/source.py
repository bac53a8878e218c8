"""Find a captioner's files: a folder, or a hub id in the cache. Nothing is downloaded unless the user allows it."""

from __future__ import annotations

from pathlib import Path

from lorakit.core.errors import LorakitError
from lorakit.core.names import expand
from lorakit.families import hub, weight_files
from lorakit.inference.captioners.spec import CaptionerSpec, kind_of


def find(model: str, fetch: bool) -> tuple[Path, CaptionerSpec]:
    """The folder of a captioner, and its kind.

    Args:
        model: a folder, or a hub id.
        fetch: whether it may be downloaded.

    Raises:
        LorakitError: it is not a captioner, is incomplete, or is not on this machine and may not or cannot be
            downloaded.
    """
    path = expand(model)
    if path.is_file():
        raise LorakitError("captioner {model} is a file: give the folder it is in: {folder}", model, path.parent)
    if path.is_dir():
        return path, _complete(model, path)
    hub_id = hub.parse(model)
    if hub_id is None or hub_id.file:
        raise LorakitError("captioner {model}: no such folder; give a folder, or a hub id such as owner/name", model)
    if folder := _cached(hub_id):
        return folder, _complete(hub_id.title, folder)
    folder = _fetch(hub_id, fetch)
    return folder, _complete(hub_id.title, folder)


def _complete(title: str, folder: Path) -> CaptionerSpec:
    """The kind of a model in a folder, after a check that no weights are missing."""
    spec, files = kind_of(title, _names(folder))
    if absent := _absent(folder, files):
        raise LorakitError("captioner {model}: {file} is not there; get the model again", title, absent[0])
    return spec


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _absent(folder: Path, files: list[str]) -> list[str]:
    """Shards that an index names and the folder lacks."""
    needs = [
        str(file)
        for name in files
        if name.endswith(".index.json")
        for file in set(weight_files.read_json(folder / name).get("weight_map", {}).values())
    ]
    return sorted(file for file in needs if not (folder / file).is_file())


def _cached(hub_id: hub.HubId) -> Path | None:
    """The complete snapshot in the cache, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id.name, revision=hub_id.revision, local_files_only=True))
        _, files = kind_of(hub_id.title, _names(folder))
    except (LocalEntryNotFoundError, HFValidationError, LorakitError):
        return None
    return None if _absent(folder, files) else folder


def _fetch(hub_id: hub.HubId, allowed: bool) -> Path:
    from huggingface_hub import HfApi, errors, is_offline_mode, snapshot_download

    title = hub_id.title
    if is_offline_mode():
        raise LorakitError(
            "captioner {model} is not in the cache and HF_HUB_OFFLINE is set: unset it, or give a folder", title
        )
    try:
        info = HfApi().model_info(hub_id.name, revision=hub_id.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        _, files = kind_of(title, list(sizes))
        if not allowed:
            megabytes = sum(sizes[file] for file in files) / 1e6
            raise LorakitError(
                "captioner {model} is not on this machine: {size:,.0f} MB would be fetched; allow it with --fetch",
                title,
                megabytes,
            )
        return Path(snapshot_download(hub_id.name, revision=hub_id.revision, allow_patterns=files))
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError, ImportError) as error:  # type: ignore[attr-defined]
        raise LorakitError("captioner {problem}; or give a folder", hub.refusal(hub_id, error)) from error
