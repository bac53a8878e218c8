"""Caption the photos of a folder, one after the other. Each caption is written immediately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorakit.config import DataConfig
from lorakit.data import caption_edits, concepts, decode, photo_folder
from lorakit.data.caption_edits import CaptionWriter
from lorakit.data.photo_folder import Photo
from lorakit.inference.captioners.spec import Captioner


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How a model's text becomes a caption.

    Attributes:
        without: words or tags to remove.
        prefix: text in front of every caption.
        is_tags: whether the text consists of tags.
    """

    without: Sequence[str] = ()
    prefix: str = ""
    is_tags: bool = False

    def caption(self, text: str, config: DataConfig) -> str:
        """The caption for a model's text."""
        text = caption_edits.without(text, self.without, self.is_tags)
        text = caption_edits.with_name(text, config, self.is_tags) if text else ""
        return " ".join(filter(None, [self.prefix, text])) if text else ""


@dataclass
class Captions:
    """The result: photo -> caption, photo -> reason for a missing caption, and whether it was stopped."""

    texts: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def waiting(config: DataConfig, overwrite: bool) -> tuple[list[Photo], list[Photo]]:
    """All photos of the folder, and those that need a caption.

    Raises:
        LorakitError: as `photo_folder.scan`.
    """
    photos = photo_folder.of_config(config).photos
    return photos, [photo for photo in photos if overwrite or not photo.caption]


def caption(
    photos: Sequence[Photo],
    captioner: Captioner,
    config: DataConfig,
    wording: Wording,
    writer: CaptionWriter | None,
    *,
    report: Callable[[int, Photo, str], object],
    stop: Callable[[], bool] = lambda: False,
) -> Captions:
    """Caption the photos. Unreadable photos are skipped.

    Args:
        writer: writes the captions; None only returns them.
        report: gets the number of processed photos, the photo, and its caption or "".
        stop: called before each photo.
    """
    result = Captions()
    for number, photo in enumerate(photos, 1):
        if stop():
            result.stopped = True
            break
        try:
            image = decode.decode(photo.path, photo.relative, edit=photo.edit).image
        except decode.Unreadable as problem:
            result.failed[photo.relative] = problem.reason
            report(number, photo, "")
            continue
        text = wording.caption(captioner(image), concepts.of_photo(photo, config))
        if not text:
            result.failed[photo.relative] = "the model returned no text"
        else:
            if writer is not None:
                writer.write(photo, text)
            result.texts[photo.relative] = text
        report(number, photo, text)
    return result
