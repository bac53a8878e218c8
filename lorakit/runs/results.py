"""What came of the runs of a batch, copied to where others look for it: a folder, or a URL that fsspec opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorakit.core.errors import LorakitError


class Results:
    """A folder or URL to which results go.

    Raises:
        LorakitError: fsspec cannot open it, or nothing can be written there.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            self._system, self._path = fsspec.core.url_to_fs(url)
            self._system.makedirs(self._path, exist_ok=True)
        except Exception as error:  # of whatever library has the protocol
            raise LorakitError("--results {url}: {reason}", url, _reason(error)) from None

    def send(self, runs: Path, name: str) -> None:
        """Copy all of a run but its checkpoints, and what it printed on a cluster; or a file of the batch.

        Raises:
            LorakitError: it cannot be written.
        """
        try:
            for file in _files(runs, name):
                target = f"{self._path}/{file.relative_to(runs).as_posix()}"
                self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._system.put_file(str(file), target)
        except Exception as error:
            raise LorakitError(
                "{name}: cannot be copied to {url} ({reason}); it stays in {runs}", name, self.url, _reason(error), runs
            ) from None


def _files(runs: Path, name: str) -> Iterator[Path]:
    for file in [runs / name, runs / f"{name}.log", *sorted((runs / name).rglob("*"))]:
        parts = file.relative_to(runs).parts
        if file.is_file() and parts[1:2] != ("checkpoints",) and not file.name.endswith(".lock"):
            yield file


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
