"""Check the texts that the photos are trained with."""

from __future__ import annotations

from lorakit.config import DataConfig
from lorakit.core import prompt_syntax
from lorakit.core.names import printable, shorten
from lorakit.data import captions, concepts
from lorakit.data.checks.report import Item, Report, names

# Seen on real photos: bound to the sentence that ends after the noun, a subject is gone once the prompt goes on.
NO_CAPTIONS = (
    "; a prompt that goes on after it, with a place say, may then show little of what is learned: write a caption for "
    "each photo that names its scene"
)


# CLIP's tokens are in the order in which they were merged, the commonest first: anna is 2,160, luna 14,425, lulu
# 26,935, sks 48,136, ohwx 47,993.
COMMON_RANK = 30_000


def check_texts(report: Report, config: DataConfig, counter: captions.TokenCounter | None) -> None:
    """Add what is wrong with the text of each photo, and with those of each concept."""
    cuts, syntax, loose = [], [], []
    for item in report.items:
        texts = captions.all_texts(item.photo, concepts.of_photo(item.photo, config))
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            texts = [printable(text) for text in texts]
            report.errors.append(f"{item.relative}: its text has what is no character: {shorten(texts[0], 60)}")
        item.text = texts[0]
        if counter is not None:
            item.tokens, item.cut = max((counter.count(text) for text in texts), key=lambda count: count[0])
        if counter is not None and item.cut:
            fit = f"its text has {item.tokens} tokens, {counter.limit} fit"
            cuts.append(f'{item.relative}: {fit}; cut off: "{shorten(item.cut, 60)}"')
        if match := next(filter(None, map(prompt_syntax.syntax, texts)), ""):
            syntax.append((item, match))
            item.findings.append(f"{match} is trained as letters")
        if text := captions.loose_braces(item.photo, concepts.of_photo(item.photo, config)):
            loose.append((item, text))
            item.findings.append("a brace is trained as a letter")
        if config.flip and any(map(captions.mentions_sides, texts)):
            item.findings.append("left or right in its text")
            report.errors.append(
                f"{item.relative}: its text says left or right, which data.flip makes untrue; "
                "set data.flip = false or change the text"
            )
    long = [item for item in report.items if counter is not None and item.tokens > counter.room]
    if counter is not None and long:
        report.chunks = -(-min(counter.limit, max(item.tokens for item in long)) // counter.room)
    if counter is not None and report.chunks > 1:
        report.notes.append(
            f"{len(long)} of {len(report.items)} texts have more than {counter.room} tokens: they are read in up to "
            f"{report.chunks} chunks of {counter.room}, as web UIs read them"
        )
    if syntax:
        report.warnings.append(
            f"{len(syntax)} of {len(report.items)} texts have what web UIs read as weights or commands and training "
            f"reads as letters, such as {syntax[0][1]}: {names(item for item, _ in syntax)}"
        )
    if loose:
        report.warnings.append(
            f"{len(loose)} of {len(report.items)} texts have a brace that begins or ends no {{a|b}} and is trained as "
            f'a letter, such as "{shorten(loose[0][1], 60)}": {names(item for item, _ in loose)}'
        )
    report.warnings += cuts if len(cuts) < 7 else [*cuts[:5], f"{len(cuts) - 5} more texts are too long and cut off"]
    for own in concepts.of_photos([item.photo for item in report.items], config):
        items = [item for item in report.items if concepts.of_photo(item.photo, config) == own]
        _check_captions(report, items, own)
        if counter is not None and own.trigger:
            report.trigger_findings += _trigger_findings(own.trigger, counter)


def _trigger_findings(trigger: str, counter: captions.TokenCounter) -> list[str]:
    """What else the base draws for the trigger, as far as it is known."""
    rank = counter.rank(trigger)
    if trigger.lower() == "sks" and rank is not None:
        return ["the trigger sks is the name of a rifle too, which Stable Diffusion may draw; ohwx has no such meaning"]
    if rank is None or rank >= COMMON_RANK:
        return []
    return [
        f'the trigger "{trigger}" is a word that the base knows well (number {rank} of its vocabulary), so what it '
        "draws for it mixes in; a rare one such as ohwx does not"
    ]


def _check_captions(report: Report, items: list[Item], config: DataConfig) -> None:
    """Add what is wrong with the captions of the photos of one concept."""
    no_caption = [item for item in items if not captions.captions_of(item.photo, config)]
    prompt = captions.instance_prompt(config)
    every = "every photo" if len(items) == len(report.items) else f"{names(items)}: each"
    if no_caption and len(no_caption) == len(items):
        report.notes.append(f'no captions: {every} is trained as "{prompt}"{NO_CAPTIONS}')
    elif no_caption:
        for item in no_caption:
            item.findings.append("no caption")
        count = f"{len(no_caption)} of {len(items)} photos have no caption"
        report.warnings.append(f'{count} and are trained as "{prompt}": {names(no_caption)}')
    caption_count = len(items) - len(no_caption)
    no_trigger = [
        item
        for item in items
        if not all(captions.has_trigger(caption, config) for caption in captions.captions_of(item.photo, config))
    ]
    for item in no_trigger:
        item.findings.append("caption without the trigger")
    if no_trigger:
        count = f"{len(no_trigger)} of {caption_count} captions are without the trigger {config.trigger}"
        report.warnings.append(f'{count}; "{config.name}, " is put in front: {names(no_trigger)}')
    several = [len(item.photo.caption_lines) for item in items if len(item.photo.caption_lines) > 1]
    if several:
        effect = (
            f"{sum(several)} captions, of which one is drawn each time" if config.caption_lines else "one text each"
        )
        option = "" if config.caption_lines else "; with data.caption_lines = true each line is a caption"
        report.notes.append(f"{len(several)} of {caption_count} caption files have several lines: {effect}{option}")
    if config.name and not config.noun and not config.class_prompt and config.kind == "subject":
        report.warnings.append(
            f'data.name = "{config.name}" is one word: give a rare word and what it is, such as "sks dog"'
        )
