"""Commands for captions: caption."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import config as configuration
from lorakit.cli import threads
from lorakit.cli.signals import stop_on_signals
from lorakit.cli.terminal import Terminal, complain, print_event, print_json, print_lines
from lorakit.cli.train_commands import Command, add_set, read_overrides
from lorakit.core import atomic
from lorakit.core.errors import ConfigError, LorakitError
from lorakit.core.events import Event
from lorakit.core.messages import Message
from lorakit.core.names import expand, quote
from lorakit.core.units import count

if TYPE_CHECKING:
    from lorakit.data.photo_folder import Photo
    from lorakit.inference.captioners.photos import Captions

# Config options that `--set` accepts, because captions depend on them.
OPTIONS = [
    *("data.name", "data.kind", "data.concepts", "data.exclude", "data.edits", "data.class_folder"),
    *("memory.device", "memory.mixed_precision", "memory.tf32"),
]


def add(command: Command) -> None:
    """Add the commands of this module by `command(name, run, help)`."""
    caption = command(
        "caption", run_caption, "write captions of photos with a model, or undo the last change of captions"
    )
    caption.set_defaults(has_events=True)
    caption.add_argument("photos", metavar="PHOTOS", help="folder of photos; captions are written beside them")
    what = caption.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--with", dest="model", metavar="MODEL", help="captioner: a folder or a hub id (docs/captions.md)"
    )
    what.add_argument("--undo", action="store_true", help="undo the last change of the captions")
    name = caption.add_mutually_exclusive_group()
    name.add_argument("--subject", metavar="'sks toy'", help="trigger (a rare word) and class to add to each caption")
    name.add_argument("--style", metavar="'sks style'", help="trigger (a rare word) to add in front of each caption")
    caption.add_argument("--prompt", default="", metavar="TEXT", help="question for the model, if it accepts one")
    caption.add_argument("--prefix", default="", metavar="TEXT", help="text to add in front of each caption")
    caption.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="WORDS",
        help="words or tags to remove, separated by commas; may be repeated",
    )
    caption.add_argument(
        "--max-tokens",
        type=int,
        default=128,
        metavar="COUNT",
        help="greatest length of a caption in tokens (default: 128)",
    )
    caption.add_argument(
        "--threshold",
        type=float,
        default=0.35,
        metavar="P",
        help="lowest probability of a tag, for taggers (default: 0.35)",
    )
    caption.add_argument(
        "--character-threshold",
        type=float,
        default=0.85,
        metavar="P",
        help="lowest probability of a character's name, for taggers (default: 0.85)",
    )
    caption.add_argument("--overwrite", action="store_true", help="replace existing captions; --undo restores them")
    caption.add_argument("--dry-run", action="store_true", help="show the captions without writing them")
    caption.add_argument("--fetch", action="store_true", help="download the model if it is not on this machine")
    add_set(caption)


def run_caption(args: argparse.Namespace) -> int:
    """`lorakit caption`. The exit code is 1 if a photo got no caption, and 130 if the command was stopped."""
    config = _config(args)
    place = expand(config.data.folder)
    if args.undo:
        return _undo(args, place)
    threads.use_idle_cores()
    terminal = Terminal(sys.stderr if args.json else sys.stdout)
    with stop_on_signals() as stop:
        from lorakit.data.caption_edits import CaptionWriter
        from lorakit.inference.captioners import photos as caption_photos, source, spec

        photos, waiting = caption_photos.waiting(config.data, args.overwrite)
        if not waiting:
            return _end(args, caption_photos.Captions(), len(photos))
        if not args.dry_run and (why := atomic.refusal(place)):
            raise LorakitError("{folder}: captions cannot be written there ({reason})", place, why)
        folder, kind = source.find(args.model, args.fetch)
        options = spec.CaptionOptions(
            prompt=args.prompt,
            max_tokens=args.max_tokens,
            threshold=args.threshold,
            character_threshold=args.character_threshold,
        )
        captioner = kind.load(folder, options, config.memory)
        phrases = [phrase.strip() for text in args.without for phrase in text.split(",")]
        wording = caption_photos.Wording(without=phrases, prefix=args.prefix, is_tags=kind.is_tags)

        def report(number: int, photo: Photo, text: str) -> None:
            if text and args.json:
                print_event(Event("caption", None, {"photo": photo.relative, "text": text}))
            elif text:
                terminal.say(f"{photo.relative}: {text}")
            if args.json:
                print_event(Event("work", None, {"doing": "captions", "position": number, "total": len(waiting)}))
            bar.advance(number)

        with (
            terminal.progress(len(waiting), what="captions") as bar,
            CaptionWriter(place, photos) as writer,
        ):
            result = caption_photos.caption(
                waiting, captioner, config.data, wording, None if args.dry_run else writer, report=report, stop=stop
            )
    return _end(args, result, len(photos) - len(waiting))


def _end(args: argparse.Namespace, result: Captions, others: int) -> int:
    """Report the result and return the exit code. `others` is the number of photos that had a caption already."""
    if args.json:
        facts = {"captions": result.texts, "failed": result.failed, "had_one": others, "stopped": result.stopped}
        print_event(Event("result", None, facts))
    else:
        print_lines(
            f"{count(len(result.texts), 'caption')} {'shown, not' if args.dry_run else ''} written".replace("  ", " ")
        )
        if others:
            print_lines(
                Message("{photos} already had a caption: not changed; --overwrite replaces it", count(others, "photo"))
            )
        if result.texts and not args.dry_run:
            print_lines(Message("undo it with: lorakit caption {folder} --undo", quote(args.photos)))
    for name, reason in result.failed.items():
        complain(Message("{photo}: no caption: {reason}", name, reason))
    if result.stopped:
        complain("stopped; run the same command again for the photos that have no caption yet")
        return 130
    return 1 if result.failed else 0


def _undo(args: argparse.Namespace, folder: Path) -> int:
    from lorakit.data import caption_edits
    from lorakit.data.entries import some_names

    result = caption_edits.undo(folder)
    if args.json:
        print_json(vars(result))
        return 0
    print_lines(Message("{captions} restored", count(len(result.restored), "caption")))
    if result.changed_since:
        print_lines(Message("not restored, because they were changed later: {names}", some_names(result.changed_since)))
    if result.remaining:
        print_lines(Message("{changes} can be undone too", count(result.remaining, "earlier change")))
    return 0


def _config(args: argparse.Namespace) -> configuration.Config:
    """Build the config from the arguments.

    Raises:
        ConfigError: an argument or an option is invalid; the error lists all problems.
    """
    overrides = read_overrides(args.set)
    problems = [
        Message("{key}: captions do not depend on this option; --set accepts {options} here", key, ", ".join(OPTIONS))
        for key in overrides
        if key not in OPTIONS
    ]
    for flag, value in (("--threshold", args.threshold), ("--character-threshold", args.character_threshold)):
        problems += [] if 0 < value < 1 else [Message("{flag} {value:g}: must be between 0 and 1", flag, value)]
    problems += [] if args.max_tokens >= 1 else [Message("--max-tokens {count}: must be 1 or more", args.max_tokens)]
    if problems:
        raise ConfigError(problems)
    flags = {"data.folder": args.photos, "train.steps": 1, "data.name": args.subject or args.style}
    flags["data.kind"] = "subject" if args.subject else "style" if args.style else None
    return configuration.load(None, {key: value for key, value in flags.items() if value is not None} | overrides)
