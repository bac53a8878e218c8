"""Thumbnails of photos for the browser, cached in memory."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorakit.config.photo_edits import NO_EDIT, PhotoEdit
from lorakit.core import image_grid
from lorakit.data.decode import Unreadable, decode, measure, painted_mask
from lorakit.data.photo_folder import Photo

SIDE = 256
# Number of cached thumbnails, of about 15 KiB each.
MAX_THUMBNAILS = 4000
# Key of a cached thumbnail: path, time of the last change, size of the file, side of the thumbnail, edit.
Key = tuple[Path, int, int, int, PhotoEdit]
QUALITY = 80
# Share of black that is blended over the parts of a photo outside its painted mask.
UNLEARNED = 0.75


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail as a `data:` URL, or the reason why the photo cannot be read.

    Attributes:
        size: (width, height) of the photo in pixels, after its rotation.
    """

    address: str = ""
    problem: str = ""
    size: tuple[int, int] = (0, 0)


class Thumbnails:
    """Creates and caches thumbnails. Thread-safe."""

    def __init__(self, workers: int = 4):
        self._cache: OrderedDict[Key, Thumbnail] = OrderedDict()
        self._pending: set[Key] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="thumbnail")

    def get(self, path: Path, side: int = SIDE, edit: PhotoEdit = NO_EDIT) -> Thumbnail:
        """The thumbnail of a photo's current file. Its longer side has `side` pixels."""
        key = self._look_up(path, side, edit)
        if isinstance(key, Thumbnail):
            return key
        thumbnail = _make(path, side, edit)
        with self._lock:
            self._cache[key] = thumbnail
            while len(self._cache) > MAX_THUMBNAILS:
                self._cache.popitem(last=False)
        return thumbnail

    def soon(self, path: Path, side: int = SIDE) -> Thumbnail | None:
        """The cached thumbnail of a picture. If there is none, a thread creates it, and this returns None at once."""
        key = self._look_up(path, side, NO_EDIT)
        if isinstance(key, Thumbnail):
            return key
        with self._lock:
            if key not in self._pending:
                self._pending.add(key)
                self._pool.submit(self._create, key)
        return None

    def _create(self, key: Key) -> None:
        try:
            self.get(key[0], key[3], key[4])
        finally:
            with self._lock:
                self._pending.discard(key)

    def _look_up(self, path: Path, side: int, edit: PhotoEdit) -> Thumbnail | Key:
        """The cached thumbnail, or one with the reason why the file cannot be read. Without either, the key to create
        one."""
        try:
            key = _key(path, side, edit)
        except OSError as error:
            return Thumbnail(problem=f"{path.name}: {error.strerror or error}")
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key, key)

    def several(
        self, photos: Sequence[Photo], progress: Callable[[int, int], object] = lambda count, total: None
    ) -> list[Thumbnail]:
        """The thumbnails of several photos, created in parallel: decoding releases Python's global lock.

        Args:
            progress: called with the number of created thumbnails and the number of all.
        """
        thumbnails = []
        for thumbnail in self._pool.map(lambda photo: self.get(photo.path, edit=photo.edit), photos):
            thumbnails.append(thumbnail)
            progress(len(thumbnails), len(photos))
        return thumbnails


def _key(path: Path, side: int, edit: PhotoEdit) -> Key:
    status = path.stat()
    return path, status.st_mtime_ns, status.st_size, side, edit


def _make(path: Path, side: int, edit: PhotoEdit) -> Thumbnail:
    try:
        raw = path.read_bytes()
        photo = decode(raw, path.name, at_least=side, edit=edit)
        size = measure(raw, path.name, edit)
    except Unreadable as problem:
        return Thumbnail(problem=problem.reason)
    image = image_grid.thumbnail(photo.image, side)
    if edit.strokes:  # darken the parts that are not trained
        mask = Image.fromarray(painted_mask(edit, measure(raw, path.name))).resize(image.size)
        image = Image.composite(image, Image.blend(image, Image.new("RGB", image.size), UNLEARNED), mask)
    return Thumbnail(address(image), size=size)


def address(image: Image.Image) -> str:
    """Encode a picture as a `data:` URL, so that the browser needs no second request and no file path."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
