"""The text that a photo is trained with. It contains the trigger, also with shuffled tags or caption dropout."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.config import DataConfig, SampleConfig
from lorakit.config.sample_prompts import parse_all
from lorakit.core import foreign_json, prompt_syntax
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import DETERMINERS, shorten
from lorakit.data import concepts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lorakit.core.protocols import Base
    from lorakit.data.photo_folder import Photo

# Most tag orders for one photo: all of them are encoded before training, and no single order is learned.
MAX_TAG_ORDERS = 8
# Separates tags that stay first, tags that are shuffled, and tags that stay last.
SEPARATOR = "|||"
WILDCARD = re.compile(r"\{([^{}|]*+\|[^{}]*)\}")
# Tokens of a text in one chunk of CLIP, and the limit without `data.max_tokens`.
CHUNK, MAX_TOKENS = 75, 225
# CLIP's split of text before byte-pair encoding (openai/CLIP, simple_tokenizer.py).
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Words that begin with a vowel sound, or with a consonant sound, against their first letter.
VOWEL_SOUNDS = ("hour", "honest", "honor", "honour", "heir")
CONSONANT_SOUNDS = ("uni", "use", "usu", "util", "uku", "ura", "eu", "one", "once", "ewe")


def article(noun: str) -> str:
    """The noun with "a" or "an", by its sound. Plural nouns and nouns with a determiner do not change."""
    words = noun.split()
    if not words or words[0].lower() in DETERMINERS or _is_plural(words[-1].lower()):
        return noun
    first = words[0].lower()
    vowel = first[0] in "aeiou" and not first.startswith(CONSONANT_SOUNDS)
    return f"{'an' if vowel or first.startswith(VOWEL_SOUNDS) else 'a'} {noun}"


def _is_plural(word: str) -> bool:
    return len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is", "as", "lens"))


def instance_prompt(config: DataConfig) -> str:
    """The text of a photo without a caption. It contains the trigger.

    "A photo of a sks dog" follows the paper ("a [identifier] [class noun]", Ruiz et al. 2022, arXiv 2208.12242).
    Without the article, the text encoder would read the trigger as the article.
    """
    if config.instance_prompt:
        return _with_trigger(config.instance_prompt, config)
    if not config.name:
        return "a picture" if config.kind == "style" else "a photo"
    return (
        f"a picture in {_style_phrase(config.name)}"
        if config.kind == "style"
        else f"a photo of {_subject_phrase(config)}"
    )


def class_prompt(config: DataConfig) -> str:
    """The text of the class, without the trigger. Prior preservation keeps the images of the class unchanged."""
    if config.class_prompt:
        return config.class_prompt
    if config.kind == "style":
        noun = config.noun.removesuffix("style").strip()
        return f"a picture in {_style_phrase(noun)}" if noun else "a picture"
    return f"a photo of {article(config.noun)}" if config.noun else "a photo"


def class_text(text: str, config: DataConfig) -> str:
    """The class text of a final text: the same text without the trigger, for prior preservation.

    If `class_prompt` is set, it is the class text of every text. The class text of the instance prompt is the class
    prompt.
    """
    if config.class_prompt or text == instance_prompt(config):
        return class_prompt(config)
    if config.kind == "style":
        # "a mug in sks style" -> "a mug"
        text = re.sub(rf"(?<!\w)(,?\s*(in|by|with)\s+)?{re.escape(config.name)}(?!\w)", "", text, flags=re.IGNORECASE)
    # "an ohwx man" -> "a man": the article follows the word after the trigger.
    pattern = rf"(?:\b(an?)\s+)?(?<!\w){re.escape(config.trigger)}(?!\w)\s*(\w*)"
    text = re.sub(pattern, lambda match: article(match[2]) if match[1] else match[2], text, flags=re.IGNORECASE)
    return " ".join(text.split()).strip(" ,") or class_prompt(config)


def class_text_of_any(text: str, configs: Sequence[DataConfig]) -> str:
    """As `class_text`, for a text of one of several concepts: the triggers of all are removed."""
    if len(configs) == 1:
        return class_text(text, configs[0])
    for config in configs:
        if text == instance_prompt(config):
            return class_prompt(config)
    for config in configs:
        text = class_text(text, config) if config.trigger and has_trigger(text, config) else text
    return text


def sample_prompts_of_all(configs: Sequence[DataConfig]) -> list[str]:
    """Default prompts of the samples of several concepts: two of each, and the class prompt of the first."""
    if len(configs) == 1:
        return sample_prompts(configs[0])
    texts = [prompt for config in configs for prompt in sample_prompts(config)[:2]]
    return list(dict.fromkeys([*texts, class_prompt(configs[0])]))


def class_photo_text(photo: Photo, config: DataConfig) -> str:
    """The text of a class image of the user: its caption, else the class in the name of its folder ("1_man/"), else the
    class prompt."""
    if photo.caption:
        return photo.caption
    return (
        f"a photo of {article(photo.subject)}"
        if concepts.NUMBERED.fullmatch(photo.path.parent.name) and photo.subject
        else class_prompt(config)
    )


def sample_prompts(config: DataConfig) -> list[str]:
    """Default prompts of the samples. The last one is the class prompt; it shows whether the class changes."""
    if config.kind == "style":
        style = f" in {_style_phrase(config.name)}" if config.name else ""
        texts = [f"a picture of {noun}{style}" for noun in ("a house", "a cat", "a tree")] + ["a picture of a house"]
    else:
        subject = f"a photo of {_subject_phrase(config)}" if config.name else "a photo"
        texts = [subject, f"{subject} on a beach", f"{subject} in the snow", class_prompt(config)]
    return list(dict.fromkeys(texts))


def _subject_phrase(config: DataConfig) -> str:
    """ "a sks dog". A name without a noun ("alice") gets no article."""
    return article(config.name) if config.noun else config.name


def _style_phrase(name: str) -> str:
    return name if name.split()[-1].lower() == "style" else f"{name} style"


def has_trigger(text: str, config: DataConfig) -> bool:
    """Whether the text contains the trigger as a word. Case does not matter, as in CLIP."""
    trigger = re.escape(config.trigger)
    return not trigger or re.search(rf"(?<!\w){trigger}(?!\w)", text, re.IGNORECASE) is not None


def final_text(caption: str | None, config: DataConfig) -> str:
    """The text that a photo is trained with: its caption, with the name in front if the trigger is missing.

    A photo without a caption gets the instance prompt.
    """
    return _without_marks(_full_text(caption, config), config)


def captions_of(photo: Photo, config: DataConfig) -> list[str]:
    """The captions of a photo: the text of its caption file, each of its lines, or the photo's name; else empty."""
    if config.caption_lines and photo.caption_lines:
        return list(photo.caption_lines)
    name = " ".join(re.sub(r"[\W\d_]+", " ", photo.path.stem).split()) if config.caption_from_name else ""
    return list(filter(None, [photo.caption or name]))


def photo_texts(photo: Photo, config: DataConfig) -> list[str]:
    """The texts of a photo, as input of `variants`."""
    return [_full_text(caption, config) for caption in captions_of(photo, config)] or [instance_prompt(config)]


def all_texts(photo: Photo, config: DataConfig) -> list[str]:
    """The texts of a photo for the check, its own first: each caption, also with the longest choice of each {a|b}."""
    texts = photo_texts(photo, config)
    if config.wildcards:
        texts += [WILDCARD.sub(lambda match: max(match[1].split("|"), key=len), text) for text in texts]
    return list(dict.fromkeys(_without_marks(text, config) for text in texts))


def loose_braces(photo: Photo, config: DataConfig) -> str:
    """A text of the photo with an unmatched brace that `data.wildcards` does not replace, such as {a|b or {a}; else
    ""."""
    texts = photo_texts(photo, config) if config.wildcards else []
    return next((text for text in texts if re.search("[{}]", WILDCARD.sub("", text))), "")


def own_text(photo: Photo, config: DataConfig) -> str:
    """The first text of a photo, which validation uses."""
    return _without_marks(photo_texts(photo, config)[0], config)


def _full_text(caption: str | None, config: DataConfig) -> str:
    if not caption:
        return instance_prompt(config)
    return _with_trigger(" ".join(filter(None, [config.caption_prefix, caption, config.caption_suffix])), config)


def _without_marks(text: str, config: DataConfig) -> str:
    """The text without separators, with the first choice of each {a|b}."""
    text = WILDCARD.sub(lambda match: match[1].split("|")[0], text) if config.wildcards else text
    return ", ".join(part.strip(" ,") for part in text.split(SEPARATOR)) if SEPARATOR in text else text


def _with_trigger(text: str, config: DataConfig) -> str:
    return text if has_trigger(text, config) else f"{config.name}, {text}"


def variants(text: str, config: DataConfig, seed: str) -> list[str]:
    """The texts that a photo alternates between, its own first.

    With `data.shuffle_tags`, `data.tag_dropout` or `data.wildcards` these are up to `MAX_TAG_ORDERS` draws. The tag
    with the trigger stays first.

    Args:
        seed: a string that identifies the run and the photo. The same seed gives the same texts.
    """
    has_wildcards = config.wildcards and WILDCARD.search(text) is not None
    draws_tags = (config.shuffle_tags or config.tag_dropout > 0) and len(_tags(text)) > 1
    texts = [_without_marks(text, config)]
    draw = random.Random(f"{seed}/tags")
    for _ in range(4 * MAX_TAG_ORDERS if has_wildcards or draws_tags else 0):
        if len(texts) == MAX_TAG_ORDERS:
            break
        candidate = _draw(text, config, draw)
        if candidate not in texts:
            texts.append(candidate)
    return texts


def _draw(text: str, config: DataConfig, draw: random.Random) -> str:
    """One text from a caption: one choice of each {a|b}, some of the tags, in another order."""
    if config.wildcards:

        def pick(match: re.Match[str]) -> str:
            choices = match[1].split("|")
            return choices[int(draw.random() * len(choices))]

        text = WILDCARD.sub(pick, text)
    if not config.shuffle_tags and not config.tag_dropout:
        return _with_trigger(_without_marks(text, config), config)
    first, others, last = _sections(text, config)
    if config.tag_dropout:
        others = [tag for tag in others if draw.random() >= config.tag_dropout]
    if config.shuffle_tags:
        # Sort by random keys: `random.shuffle` may change between versions of Python, `random.random` may not.
        others = sorted(others, key=lambda _: draw.random())
    return _with_trigger(", ".join([*first, *others, *last]), config)


def _sections(text: str, config: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay first, those that are shuffled and dropped, and those that stay last.

    "fixed ||| others ||| last" sets them. Without separators, the tag with the trigger and `data.keep_tags` tags stay
    first.
    """
    parts = [_tags(part) for part in text.split(SEPARATOR, 2)]
    if len(parts) > 1:
        return parts[0], parts[1], parts[2] if len(parts) > 2 else []
    others = parts[0]
    first = [tag for tag in others if config.trigger and has_trigger(tag, config)][:1]
    for tag in first:
        others.remove(tag)
    return first + others[: config.keep_tags], others[config.keep_tags :], []


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def mentions_sides(text: str) -> bool:
    """Whether the text says left or right, which is wrong for a mirrored photo."""
    return re.search(r"(?<!\w)(left|right)(?!\w)", text, re.IGNORECASE) is not None


def max_chunks(config: DataConfig, chunked: bool = True) -> int:
    """The largest number of chunks of a text that are encoded; 1 for a base that does not support more."""
    return (config.max_tokens or MAX_TOKENS) // CHUNK if chunked else 1


# CLIP has 49,408 tokens. The few hundred of the bundled base are not ordered by frequency.
LARGE_VOCABULARY = 40_000


class TokenCounter:
    """Counts tokens with the base's tokenizer. No text encoder is loaded.

    Args:
        folder: the base's `tokenizer` folder, with tokenizer.json or with vocab.json and merges.txt.
        limit: tokens of a text that are encoded.
        chunks: the largest number of chunks.

    Attributes:
        room: tokens of a text in one chunk.
        limit: tokens of a text that are read.

    Raises:
        LorakitError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, limit: int, chunks: int = 1):
        self.room = limit - 2
        self.limit = self.room * chunks
        self._tokenizer = _load_tokenizer(folder)

    def rank(self, word: str) -> int | None:
        """Rank of a word in a large vocabulary, the most common first; None if the word is not a single token."""
        ids = self._tokenizer.encode(word, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 and self._tokenizer.get_vocab_size() > LARGE_VOCABULARY else None

    def count(self, text: str) -> tuple[int, str]:
        """The number of tokens of the text, and the part beyond the limit ("" if the text fits)."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        count = len(encoding.ids)
        return count, text[encoding.offsets[self.limit][0] :].strip() if count > self.limit else ""


def prompt_findings(sample: SampleConfig, base: Base) -> list[str]:
    """Messages about prompts that are truncated, partly ignored, or read differently than in web UIs."""
    tokenizer = base.tokenizers.get("tokenizer")
    findings: list[str] = []
    own = parse_all(list(sample.prompts), sample, (0, 0))
    negative = [prompt.sample.negative_prompt for prompt in own]
    for prompt in dict.fromkeys([*(prompt.text for prompt in own), *negative, sample.negative_prompt]):
        lines = prompt_syntax.ignored(prompt)
        if tokenizer is not None and not base.chunked_texts:
            counter = TokenCounter(tokenizer, base.max_tokens)
            count, cut = counter.count("".join(part.text for group in prompt_syntax.parse(prompt) for part in group))
            template = 'CLIP reads {limit} of {count} tokens; cut off: "{cut}"'
            lines += [Message(template, counter.limit, count, shorten(cut, 60))] if cut else []
        findings += [Message('prompt "{prompt}": {what}', shorten(prompt, 60), line) for line in lines]
    return findings


def _load_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise LorakitError("{folder}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt)", folder)
    return _clip_tokenizer(folder)


def _clip_tokenizer(folder: Path) -> Tokenizer:
    """Build CLIP's tokenizer from vocab.json and merges.txt, like transformers."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = foreign_json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    merges = [(left, right) for left, right in pairs]
    model = models.BPE(
        vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
