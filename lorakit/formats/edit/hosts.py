"""Install an adapter and its side files into the folders of a program. No torch."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

from lorakit.core import atomic, registry, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.core.names import is_file_name, quote
from lorakit.core.registry import FORMATS
from lorakit.formats import compatibility, embeddings, identify, metadata as meta
from lorakit.formats.facts.hosts import Host
from lorakit.formats.inspect import Report, inspect

Say = Callable[[str], object]
# Words in the names of adapter folders.
_LORA_NAMES = {"lora", "loras", "lycoris", "locon"}


def install(
    source: Path, host: Host, place: Path, *, name: str = "", any_folder: bool = False, say: Say = lambda _: None
) -> dict[str, Path]:
    """Copy an adapter and its side files. Return the copies: "adapter", "json", "preview", "embedding <word>".

    The copy of an embedding without an adapter is "embedding". No file is overwritten: the copy gets another name. If
    the same adapter exists already, only missing side files are copied.

    Args:
        source: a file, or a folder with one adapter.
        place: the program's folder, or its folder of LoRA files.
        name: name of the copy, without suffix (default: as `source`).
        any_folder: accept `place` as the folder of LoRA files without a check.
        say: called with a message if the program cannot use the adapter with its own bases.

    Raises:
        LorakitError: the program does not read all of it, or the folder is not the program's or cannot be written.
    """
    report = inspect(source)
    if report.kind != "embedding":
        _require_reader(source, report, host)
    source = identify.adapter_file(source)
    if name and not is_file_name(name):
        raise LorakitError("--name {name!r} cannot be a file name: leave out slashes", name)
    if report.kind == "embedding":
        return _install_word(source, report, host, place, name, any_folder)
    of_words = embeddings.word_files(source, report.metadata)
    folder, words = folders(host, place, bool(of_words), any_folder)
    target = _free(folder, name or source.stem, source)
    copies = {f"embedding {word}": (path, words / path.name) for word, path in of_words.items()}
    _require_same(copies.values())
    previews = [file for ending in meta.PREVIEWS if (file := source.with_suffix(ending)).is_file()]
    has_own = any(target.with_suffix(ending).exists() for ending in meta.PREVIEWS)
    if host.has_preview and previews and not has_own:
        copies["preview"] = previews[0], target.with_suffix(previews[0].suffix)
    json_file = target.with_suffix(".json")
    text = _sidecar(source, report) if host.has_json and not json_file.exists() else ""
    with _undo(target) as files:
        for path, there in copies.values():
            if not there.exists():
                files.append(there)
                _copy(path, there)
        if text:
            files.append(json_file)
            atomic.write(json_file, text)
        if not target.exists():
            _copy(source, target)  # last: a program that looks now finds all side files
    if report.only:
        say(
            Message(
                "{target} fits {only} only: {host} lists it, and cannot draw with it on another base",
                target.name,
                report.only,
                host.title,
            )
        )
    result = {"adapter": target} | {label: there for label, (_, there) in copies.items()}
    return result | ({"json": json_file} if text else {})


def _install_word(
    source: Path, report: Report, host: Host, place: Path, name: str, any_folder: bool
) -> dict[str, Path]:
    """Copy an embedding without an adapter. The name of the file becomes its word."""
    _require_family(report, host)
    target = folders(host, place, True, any_folder)[1] / f"{name or source.stem}.safetensors"
    _require_same([(source, target)])
    with _undo(target):
        if not target.exists():
            _copy(source, target)
    return {"embedding": target}


def _require_same(copies: Iterable[tuple[Path, Path]]) -> None:
    """Refuse to install an embedding if another one has its name."""
    for path, there in copies:
        if there.exists() and not filecmp.cmp(path, there, shallow=False):
            raise LorakitError(
                "{there} is another embedding of that name: move it away, or train with another trigger", there
            )


def folders(host: Host, place: Path, has_words: bool = False, any_folder: bool = False) -> tuple[Path, Path]:
    """The program's folders of adapters and of embeddings; `place` is its own folder or that of adapters.

    Raises:
        LorakitError: it is neither, or the folder of embeddings is needed and not found.
    """
    if not place.is_dir():
        raise LorakitError(
            "{place}: there is no such folder; name that of {host}, or that of its LoRA files", place, host.title
        )
    root = place.absolute()
    if not any_folder and ((place / host.loras).is_dir() or (place / host.mark).exists()):
        folder = place / host.loras
    elif any_folder or _holds_adapters(root):
        folder = place
        root = root.parents[min(len(Path(host.loras).parts), len(root.parents)) - 1]
    else:
        raise LorakitError(
            "{place} has no {loras}: it is not the folder of {host}. A folder of LoRA files has lora "
            "in its name or LoRA files in it. Give one of these folders, or add --any-folder",
            place,
            host.loras,
            host.title,
        )
    words = folder if host.embeddings == host.loras else root / host.embeddings
    if has_words and not (words.is_dir() or words == folder):
        raise LorakitError(
            "{words}: no such folder for the trigger's embedding; name the folder of {host} itself", words, host.title
        )
    return folder, words


def _holds_adapters(folder: Path) -> bool:
    """Whether a folder looks like a folder of LoRA files, by its name or its content."""
    names = [path.name.lower() for path in (folder, folder.parent, folder.resolve())]
    if any(_LORA_NAMES & set(re.findall("[a-z]+", name)) for name in names):
        return True
    for file in sorted(folder.glob("*.safetensors"))[:5]:
        with contextlib.suppress(LorakitError):
            if identify.kind(safetensors_header.read(file).shapes()) == "adapter":
                return True
    return False


def _require_reader(source: Path, report: Report, host: Host) -> None:
    """Refuse an adapter that the program would not read completely, with advice."""
    failures = report.failures([host.reader])
    _require_family(report, host)
    odd = next((word for word in host.methods if word in report.method.lower()), "")
    if not failures and not odd:
        return
    why = (
        report.readers[host.reader].line()
        if failures and report.readers
        else Message("it does not apply {method}", report.method)
    )
    why = report.damage or why
    method = report.method.lower()
    others = [fmt for fmt in FORMATS if fmt != report.format and not odd]
    better = [fmt for fmt in others if not compatibility.predict_compatibility(method, fmt)[host.reader]]
    if report.damage:
        way = "it cannot be used anywhere"
    elif better:
        way = Message("write a file that it reads: lorakit export {source} --to {better}", quote(source), better[0])
    else:
        way = Message(
            "a model with it merged in works there: lorakit merge {source} --base BASE --output NEW.safetensors",
            quote(source),
        )
    raise LorakitError("{host} does not read all of {report}: {why}; {way}", host.title, report.name, why, way)


def _require_family(report: Report, host: Host) -> None:
    """Refuse an adapter for bases that the program does not support."""
    if host.families and report.family not in host.families:
        titles = join(" and ", (registry.version_of(family).title for family in host.families))
        family = registry.version_of(report.family).title if report.family else "an unknown model"
        raise LorakitError(
            "{report} is for {family}, and {host} draws with {titles} only", report.name, family, host.title, titles
        )


def _free(folder: Path, name: str, source: Path) -> Path:
    """The first of `name`, `name-2`, ... that does not exist or is this adapter."""
    for number in count(1):
        target = folder / f"{name}{f'-{number}' if number > 1 else ''}.safetensors"
        if target.is_file() and filecmp.cmp(source, target, shallow=False):
            return target
        if not any(os.path.lexists(target.with_suffix(ending)) for ending in (".safetensors", ".json", *meta.PREVIEWS)):
            return target
    raise AssertionError("there is always a free number")


def _sidecar(source: Path, report: Report) -> str:
    """The content of `<name>.json`: that of the source, else from the adapter's metadata."""
    table = meta.read_sidecar(source)
    if not table and report.trigger:
        table = {"activation text": report.trigger} | (
            meta.sidecar(report.metadata) if "lorakit.version" in report.metadata else {}
        )
    return json.dumps(table, indent=2, ensure_ascii=False) if table else ""


def _copy(source: Path, target: Path) -> None:
    """Copy a file atomically, and only if the target does not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = atomic.temporary_path(target)
    try:
        shutil.copyfile(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)  # fails if the target was created meanwhile
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            atomic.replace(temporary, target)
        atomic.sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _undo(target: Path) -> Iterator[list[Path]]:
    """If an exception occurs inside, delete the new files."""
    files: list[Path] = []
    try:
        yield files
    except BaseException as error:
        for file in files:
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise LorakitError(
                "{parent}: cannot be written ({reason}); nothing there was changed",
                target.parent,
                error.strerror or error,
            ) from None
        raise
