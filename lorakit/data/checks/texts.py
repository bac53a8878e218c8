"""Check the training texts of the photos."""

from __future__ import annotations

from lorakit.config import DataConfig
from lorakit.core import prompt_syntax
from lorakit.core.messages import Message
from lorakit.core.names import printable, shorten
from lorakit.data import captions, concepts
from lorakit.data.checks.report import Item, Report, names

# Observed on real photos: if all texts end after the noun, the subject disappears when a prompt continues.
NO_CAPTIONS = (
    "; a longer prompt, which adds a place for example, may then show little of what is learned: "
    "write a caption for each photo that names its scene (`lorakit caption` lets a model do that)"
)


# CLIP's tokens are ordered by their merges, the most common first: anna is 2,160, luna 14,425, lulu 26,935, sks 48,136,
# ohwx 47,993.
COMMON_RANK = 30_000

LEFT_OR_RIGHT = (
    "{photo}: its text says left or right, which data.flip makes untrue; set data.flip = false or change the text"
)
LONG_TEXTS = (
    "texts of more than {room} tokens: {count} of {all}, read in up to {chunks} chunks of {room}, as web UIs read them"
)
LONG_TRIGGER = (
    "the trigger {word} has {tokens} tokens; adapter.new_tokens learns a word of {room} at most: choose a shorter one"
)
SYNTAX = (
    "texts with what web UIs read as weights or commands and training reads as letters, such as {example}: "
    "{count} of {all} ({names})"
)
BRACES = (
    "texts with a brace that begins or ends no {{a|b}} and is trained as a letter, such as "
    '"{example}": {count} of {all} ({names})'
)


def check_texts(report: Report, config: DataConfig, counter: captions.TokenCounter | None) -> None:
    """Add the problems of each photo's text, and those of each concept's texts."""
    cuts, syntax, loose = [], [], []
    for item in report.items:
        texts = captions.all_texts(item.photo, concepts.of_photo(item.photo, config))
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for text in texts for character in text):
            texts = [printable(text) for text in texts]
            report.errors.append(
                Message(
                    "{photo}: its text has invalid characters: {text}; write them again",
                    item.relative,
                    shorten(texts[0], 60),
                )
            )
        item.text = texts[0]
        if counter is not None:
            item.tokens, item.cut = max((counter.count(text) for text in texts), key=lambda count: count[0])
        if counter is not None and item.cut:
            fit = Message("its text has {tokens} tokens, {limit} fit", item.tokens, counter.limit)
            cuts.append(Message('{photo}: {fit}; cut off: "{cut}"', item.relative, fit, shorten(item.cut, 60)))
        if match := next(filter(None, map(prompt_syntax.syntax, texts)), ""):
            syntax.append((item, match))
            item.findings.append(Message("{syntax} is trained as letters", match))
        if text := captions.loose_braces(item.photo, concepts.of_photo(item.photo, config)):
            loose.append((item, text))
            item.findings.append("a brace is trained as a letter")
        if config.flip and any(map(captions.mentions_sides, texts)):
            item.findings.append("left or right in its text")
            report.errors.append(Message(LEFT_OR_RIGHT, item.relative))
    long = [item for item in report.items if counter is not None and item.tokens > counter.room]
    if counter is not None and long:
        report.chunks = -(-min(counter.limit, max(item.tokens for item in long)) // counter.room)
    if counter is not None and report.chunks > 1:
        report.notes.append(Message(LONG_TEXTS, counter.room, len(long), len(report.items), report.chunks))
    if syntax:
        report.warnings.append(
            Message(SYNTAX, syntax[0][1], len(syntax), len(report.items), names(item for item, _ in syntax))
        )
    if loose:
        report.warnings.append(
            Message(BRACES, shorten(loose[0][1], 60), len(loose), len(report.items), names(item for item, _ in loose))
        )
    report.warnings += (
        cuts
        if len(cuts) < 7
        else [*cuts[:5], Message("further texts that are too long and cut off: {count}", len(cuts) - 5)]
    )
    for own in concepts.of_photos([item.photo for item in report.items], config):
        items = [item for item in report.items if concepts.of_photo(item.photo, config) == own]
        if own.name and any(item.readable for item in items):  # else the texts are not known yet
            _check_captions(report, items, own)
        if counter is not None and own.trigger:
            report.trigger_findings += _trigger_findings(own.trigger, counter)
            tokens = counter.count(own.trigger)[0]
            report.long_triggers += [Message(LONG_TRIGGER, own.trigger, tokens, counter.room)] * (tokens > counter.room)


def _trigger_findings(trigger: str, counter: captions.TokenCounter) -> list[str]:
    """Messages about other known meanings of the trigger."""
    rank = counter.rank(trigger)
    if trigger.lower() == "sks" and rank is not None:
        return ["the trigger sks is the name of a rifle too, which Stable Diffusion may draw; ohwx has no such meaning"]
    if rank is None or rank >= COMMON_RANK:
        return []
    return [
        Message(
            'the trigger "{word}" is a word that the base knows well (number {rank} of its vocabulary), so what '
            "it draws for it mixes in; a rare one such as ohwx does not",
            trigger,
            rank,
        )
    ]


def _check_captions(report: Report, items: list[Item], config: DataConfig) -> None:
    """Add the problems of the captions of one concept."""
    no_caption = [item for item in items if not captions.captions_of(item.photo, config)]
    prompt = captions.instance_prompt(config)
    every = "every photo" if len(items) == len(report.items) else Message("{names}: each", names(items))
    if no_caption and len(no_caption) == len(items):
        line = Message('no captions: {photos} is trained as "{prompt}"{why}', every, prompt, NO_CAPTIONS)
        report.notes.append(line)
    elif no_caption:
        for item in no_caption:
            item.findings.append("no caption")
        count = Message("photos without a caption: {count} of {all}", len(no_caption), len(items))
        report.warnings.append(Message('{photos}, trained as "{prompt}": {names}', count, prompt, names(no_caption)))
    caption_count = len(items) - len(no_caption)
    no_trigger = [
        item
        for item in items
        if not all(captions.has_trigger(caption, config) for caption in captions.captions_of(item.photo, config))
    ]
    for item in no_trigger:
        item.findings.append("caption without the trigger")
    if no_trigger:
        count = Message(
            "captions without the trigger {trigger}: {count} of {all}",
            *(config.trigger, len(no_trigger), caption_count),
        )
        report.warnings.append(
            Message('{captions}; "{name}, " is put in front: {names}', count, config.name, names(no_trigger))
        )
    several = [len(item.photo.caption_lines) for item in items if len(item.photo.caption_lines) > 1]
    if several:
        effect = (
            Message("{count} captions, of which one is drawn each time", sum(several))
            if config.caption_lines
            else "one text each"
        )
        option = "" if config.caption_lines else "; with data.caption_lines = true each line is a caption"
        report.notes.append(
            Message(
                "caption files with several lines: {count} of {all}; {effect}{option}",
                *(len(several), caption_count, effect, option),
            )
        )
    if config.name and not config.noun and not config.class_prompt and config.kind == "subject":
        report.warnings.append(
            Message('data.name = "{name}" is one word: give a rare word and what it is, such as "sks dog"', config.name)
        )
