"""CLIP's tokenizer for a base in a single file, which contains none. No torch.

All Stable Diffusion models use the vocabulary of CLIP ViT-L/14; each text encoder has its own padding token (see
`loading.load_tokenizer`). Places, in order: the folder of `model.tokenizer`, the base's folder, Hugging Face's cache,
the programs in `LORAKIT_HOSTS`, installed packages, and last the hub.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorakit.core import atomic, foreign_json
from lorakit.core.cache_dir import cache_dir
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import expand

REPOSITORY = "openai/clip-vit-large-patch14"
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
FILES = ("vocab.json", "merges.txt")
WORDS, MERGES = 49_408, 48_894
_SOURCE = f"{REPOSITORY}@{REVISION[:7]}"
FROM_HUB = Message("tokenizer: CLIP's, {name} on the hub", _SOURCE)
TO_FETCH = Message(
    "tokenizer: CLIP's, {name} on the hub: it is not on this machine and is fetched once, 1.5 MB", _SOURCE
)
WAYS = (
    "set model.tokenizer to a folder with vocab.json and merges.txt, or to that of ComfyUI or Forge; or install "
    "clip-anytorch, which brings the vocabulary"
)
OWN = "set model.tokenizer to the folder of the base's own"
# Folders with CLIP's vocabulary, relative to the folder of a program.
HOST_FOLDERS = (
    "comfy/sd1_tokenizer",
    "ComfyUI/comfy/sd1_tokenizer",
    "backend/huggingface/*/*/tokenizer",
    "webui/backend/huggingface/*/*/tokenizer",
    "models--*/snapshots/*",
    "models--*/snapshots/*/tokenizer",
    "hub/models--*/snapshots/*",
    "models/Diffusers/models--*/snapshots/*/tokenizer",
    "models/*/main/*/tokenizer",
    "*/tokenizer",
)
PYTHONS = "venv/lib/python* .venv/lib/python* venv/Lib .venv/Lib python_embeded/Lib system/python/Lib python/Lib"
# Module -> package; each contains OpenAI's file.
PACKAGES = {"clip": "clip-anytorch", "open_clip": "open_clip_torch"}
ARCHIVE = "bpe_simple_vocab_16e6.txt.gz"


def find(setting: str, file: Path, words: int) -> tuple[Path | None, str]:
    """The tokenizer's folder for a base in one file (None if only the hub has it), and a message about its origin.

    Args:
        setting: `model.tokenizer`.
        words: rows of the base's text encoder.

    Raises:
        LorakitError: the named tokenizer or that in the base's folder is incomplete, or has another vocabulary size.
    """
    if setting:
        folder = expand(setting)
        if not folder.exists():
            raise LorakitError("model.tokenizer: {folder} does not exist", folder)
        below = [folder / "tokenizer", folder, *(folder for _, folder in _of_host(folder))]
        folder = next((path for path in below if _fits(path, words)), below[0] if below[0].is_dir() else folder)
        require(folder, words, "model.tokenizer must name a folder with both, or a base's")
        return folder, Message("tokenizer: {folder}, as model.tokenizer says", folder)
    neighbour = file.parent / "tokenizer"
    if neighbour.is_dir():
        require(neighbour, words)
        return neighbour, Message("tokenizer: {folder}", neighbour)
    for place, folder in [("the base's folder", file.parent), *_on_this_machine()]:
        if _fits(folder, words):
            line = Message("tokenizer: CLIP's, from {place} ({folder})", place, folder)
            return folder, FROM_HUB if folder.name == REVISION else line
    return None, TO_FETCH


def missing(base: str, words: int) -> str | None:
    """The reason why a base whose tokenizer is not on this machine cannot be used, or None if it can be downloaded."""
    from huggingface_hub import is_offline_mode

    if words != WORDS:
        return Message(
            "base {file} reads {words} words where CLIP's tokenizer has {count}: set model.tokenizer",
            base,
            words,
            WORDS,
        )
    line = Message("base {file} has no tokenizer with it, and HF_HUB_OFFLINE is set: {ways}", base, WAYS)
    return line if is_offline_mode() else None


def fetch(base: str, words: int) -> Path:
    """Download CLIP's tokenizer into Hugging Face's cache.

    Raises:
        LorakitError: the hub cannot be reached or is switched off, or the files do not fit.
    """
    if problem := missing(base, words):
        raise LorakitError(problem)
    folder = from_hub(base, REPOSITORY, REVISION, FILES, ("no tokenizer with it, and CLIP's", WAYS))
    require(folder, words)
    return folder


def from_hub(base: str, repository: str, revision: str, files: Sequence[str], words: tuple[str, str]) -> Path:
    """Download files of a repository at a commit into Hugging Face's cache. Return their folder.

    Args:
        words: what the base lacks, and the alternatives, for the message.

    Raises:
        LorakitError: the hub cannot be reached.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        *_, folder = (Path(hf_hub_download(repository, name, revision=revision)).parent for name in files)
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LorakitError(
            "base {file} has {what} cannot be fetched from {hub} ({reason}): {ways}",
            *(base, words[0], constants.ENDPOINT, reason, words[1]),
        ) from error
    return folder


def require(folder: Path, words: int, advice: str = OWN) -> None:
    """Check that a folder has a tokenizer with this vocabulary size.

    Raises:
        LorakitError: a file is missing or damaged, or the size differs.
    """
    if not (folder / "tokenizer.json").is_file():
        for name in FILES:
            if not (folder / name).is_file():
                file = f"{folder.name}/{name}"
                raise LorakitError("{file} is missing in {folder}: {advice}", file, folder.parent, advice)
    try:
        count, merges = _counts(folder, (folder / FILES[0]).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LorakitError("tokenizer {folder} is damaged: {advice}", folder, OWN) from None
    if count != words:
        raise LorakitError(
            "tokenizer {folder} knows {count} words where its text encoder has {words}: {advice}",
            *(folder, count, words, OWN),
        )
    if words == WORDS and merges != MERGES:
        raise LorakitError(
            "tokenizer {folder} has {count} merges where CLIP's has {merges}: {advice}", folder, merges, MERGES, OWN
        )


def require_fit(base: Path, folder: Path, rows: int) -> None:
    """Check that the tokenizer of a base in diffusers layout has no more tokens than its text encoder has rows.

    Raises:
        LorakitError: it has more, or is broken; transformers would load an almost empty tokenizer without a warning.
    """
    try:
        count, _ = _counts(folder, (folder / FILES[0]).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LorakitError("{name} of base {path} is damaged: get the base again", folder.name, base) from None
    if not 256 <= count <= rows:
        raise LorakitError(
            "{name} of base {path} knows {count} words where its text encoder has {rows}: get the base again",
            *(folder.name, base, count, rows),
        )


def _fits(folder: Path, words: int) -> bool:
    """Whether a folder has both files of CLIP's vocabulary, with this many tokens."""
    try:
        require(folder, words)
    except LorakitError:
        return False
    return all((folder / name).is_file() for name in FILES)


def _counts(folder: Path, two_files: bool) -> tuple[int, int]:
    """The numbers of tokens and merges of a tokenizer, from vocab.json and merges.txt or from tokenizer.json."""
    paths = [folder / name for name in FILES] if two_files else [folder / "tokenizer.json"]
    return _count_in(tuple((str(path), path.stat().st_mtime_ns) for path in paths))


@functools.lru_cache(maxsize=64)
def _count_in(files: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    """As `_counts`; results are cached while the files do not change."""
    first, *rest = [Path(path).read_text(encoding="utf-8") for path, _ in files]
    if not rest:
        table = foreign_json.loads(first)
        words = {**table["model"]["vocab"], **{token["content"]: 0 for token in table.get("added_tokens", [])}}
        return len(words), len(table["model"]["merges"])
    return len(dict(foreign_json.loads(first))), sum(len(line.split()) == 2 for line in _lines(rest[0]))


def _lines(merges: str) -> list[str]:
    return [line for line in merges.split("\n") if not line.startswith("#version")]


def _on_this_machine() -> Iterator[tuple[str, Path]]:
    """Places that may have CLIP's vocabulary: (name for messages, folder)."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    revisions = sorted(cache.glob("models--*/snapshots/*"), key=lambda path: (path.name != REVISION, str(path)))
    for revision in revisions:
        for folder in (revision, revision / "tokenizer"):
            yield "Hugging Face's cache", folder
    for host in filter(None, os.environ.get("LORAKIT_HOSTS", "").split(os.pathsep)):
        yield from _of_host(expand(host))
    for module, package in PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            yield from _unpacked(f"the package {package}", Path(spec.origin).parent / ARCHIVE)


def _of_host(host: Path) -> Iterator[tuple[str, Path]]:
    """The same below the folder of a program: ComfyUI, A1111, Forge, SD.Next, InvokeAI, or a Hugging Face cache."""
    for pattern in HOST_FOLDERS:
        for folder in sorted(host.glob(pattern)):
            yield str(host), folder
    for pattern in PYTHONS.split():
        for module in PACKAGES:
            for archive in sorted(host.glob(f"{pattern}/site-packages/{module}/{ARCHIVE}")):
                yield from _unpacked(str(host), archive)


def _unpacked(place: str, archive: Path) -> Iterator[tuple[str, Path]]:
    """Write OpenAI's file as vocab.json and merges.txt into lorakit's cache. Nothing is yielded if the file is damaged.

    The vocabulary is every byte, every byte at the end of a word, the result of each merge, and two special tokens
    (openai/CLIP, simple_tokenizer.py).
    """
    try:
        lines = gzip.decompress(archive.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, ValueError, zlib.error):
        return
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(line.split()) for line in lines)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({word: number for number, word in enumerate(words)}, ensure_ascii=False)
    folder = cache_dir() / f"clip-tokenizer-{zlib.crc32(vocabulary.encode()):08x}"
    if not all((folder / name).is_file() for name in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / FILES[0], vocabulary)
        atomic.write(folder / FILES[1], "\n".join(["#version: 0.2", *lines, ""]))
    yield place, folder


def _byte_letters() -> list[str]:
    """The printable character for each byte in byte-level BPE, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
