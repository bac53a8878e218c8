"""Find the base that an adapter's metadata names, if it is on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit import config as configuration
from lorakit.core.errors import LorakitError
from lorakit.core.names import expand, quote
from lorakit.families import hub
from lorakit.families.describe import BUNDLED, describe


def find(adapter: Path, metadata: Mapping[str, str]) -> str:
    """The base that an adapter was trained on: a path, a hub id in the cache, or "pocket". Nothing is downloaded.

    If the metadata has the hash of the base, the base found must have it too.

    Raises:
        LorakitError: it is not on this machine, or the file names none; the message says what to give.
    """
    title, expected = metadata.get("ss_sd_model_name", ""), metadata.get("lorakit.base", "")
    source = metadata.get("lorakit.base_source", "") or (title if hub.parse(title) else "")
    for candidate in _candidates(adapter, title, source):
        hub_id = None if expand(candidate).exists() else hub.parse(candidate)
        if hub_id is not None and not hub.cached(hub_id):
            continue
        try:
            info = describe(candidate)
            if expected in ("", info.hash):
                return candidate
        except LorakitError:
            continue
    if not title:
        raise LorakitError("{file} does not say what base it was trained on: give it with --base", adapter.name)
    where = f"--base {quote(source)}" if source else "--base and its path"
    raise LorakitError("{file} was trained on {base}, which is not found here: give {how}", adapter.name, title, where)


def _candidates(adapter: Path, title: str, source: str) -> Iterator[str]:
    """Possible bases: the bundled one, that of the run's config, the hub's cache, the adapter's folder, the current
    folder."""
    if title == BUNDLED:
        yield BUNDLED
    for run in (adapter.absolute().parent, *adapter.absolute().parents[1:3]):
        if (run / "config.toml").is_file():
            try:
                yield configuration.load(run / "config.toml").model.base
            except LorakitError:
                continue
    if source:
        yield source
    name = title.replace("\\", "/").rpartition("/")[2]
    for folder in (adapter.absolute().parent, Path.cwd()):
        path = folder / name
        if name and path.exists():
            yield str(path)
