"""The words that go with a photo. The trigger is in every one of them, shuffled and dropped out or not."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.config import DataConfig
from lorakit.core.errors import LorakitError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Orders of its tags that a photo is shown with: enough that no order is learned, few enough to be encoded beforehand.
SHUFFLES = 8
# How CLIP splits text before its byte-pair encoding (openai/CLIP, simple_tokenizer.py).
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Words whose first sound is not what their first letter says.
VOWEL_SOUNDS = ("hour", "honest", "honor", "honour", "heir")
CONSONANT_SOUNDS = ("uni", "use", "usu", "util", "uku", "ura", "eu", "one", "once", "ewe")
DETERMINED = ("a", "an", "the", "my", "your", "his", "her", "our", "their", "this", "that", "some")


def article(noun: str) -> str:
    """The noun with "a" or "an" as it is spoken; plural nouns and nouns that have a determiner are left alone."""
    words = noun.split()
    if not words or words[0].lower() in DETERMINED or _plural(words[-1].lower()):
        return noun
    first = words[0].lower()
    vowel = first[0] in "aeiou" and not first.startswith(CONSONANT_SOUNDS)
    return f"{'an' if vowel or first.startswith(VOWEL_SOUNDS) else 'a'} {noun}"


def _plural(word: str) -> bool:
    return len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is", "as", "lens"))


def instance_prompt(config: DataConfig) -> str:
    """The text of a photo that has no caption; the trigger is in it.

    "A photo of a sks dog", as the paper has it ("a [identifier] [class noun]", Ruiz et al. 2022, arXiv 2208.12242):
    without the article the trigger takes its place, and for the text encoder little else is then new.
    """
    if config.instance_prompt:
        return _with_trigger(config.instance_prompt, config)
    if not config.name:
        return "a picture" if config.kind == "style" else "a photo"
    return f"a picture in {_style(config.name)}" if config.kind == "style" else f"a photo of {_subject(config)}"


def class_prompt(config: DataConfig) -> str:
    """The text that stands for all of the kind, without the trigger: what prior preservation keeps as it was."""
    if config.class_prompt:
        return config.class_prompt
    if config.kind == "style":
        noun = config.noun.removesuffix("style").strip()
        return f"a picture in {_style(noun)}" if noun else "a picture"
    return f"a photo of {article(config.noun)}" if config.noun else "a photo"


def class_text(text: str, config: DataConfig) -> str:
    """A final text without the trigger: what the base is to go on drawing for it.

    With `class_prompt` set that is the answer to every text; so it is to the bare instance prompt.
    """
    if config.class_prompt or text == instance_prompt(config):
        return class_prompt(config)
    if config.kind == "style":
        # "a mug in sks style" -> "a mug"
        text = re.sub(rf"(?<!\w)(,?\s*(in|by|with)\s+)?{re.escape(config.name)}(?!\w)", "", text, flags=re.IGNORECASE)
    # "an ohwx man" -> "a man": the article before the trigger becomes that of the word after it.
    named = rf"(?:\b(an?)\s+)?(?<!\w){re.escape(config.trigger)}(?!\w)\s*(\w*)"
    text = re.sub(named, lambda found: article(found[2]) if found[1] else found[2], text, flags=re.IGNORECASE)
    return " ".join(text.split()).strip(" ,") or class_prompt(config)


def sample_prompts(config: DataConfig) -> list[str]:
    """What is drawn where no prompts are given; the last is the class, to see that it stays as it was."""
    if config.kind == "style":
        style = f" in {_style(config.name)}" if config.name else ""
        prompts = [f"a picture of {thing}{style}" for thing in ("a house", "a cat", "a tree")] + [
            "a picture of a house"
        ]
    else:
        subject = f"a photo of {_subject(config)}" if config.name else "a photo"
        prompts = [subject, f"{subject} on a beach", f"{subject} in the snow", class_prompt(config)]
    return list(dict.fromkeys(prompts))


def _subject(config: DataConfig) -> str:
    """ "a sks dog"; a name without a noun ("alice") is nobody's kind and takes no article."""
    return article(config.name) if config.noun else config.name


def _style(name: str) -> str:
    return name if name.split()[-1].lower() == "style" else f"{name} style"


def has_trigger(text: str, config: DataConfig) -> bool:
    """Whether the trigger stands in the text as a word; CLIP does not know capitals, so neither does this."""
    trigger = re.escape(config.trigger)
    return not trigger or re.search(rf"(?<!\w){trigger}(?!\w)", text, re.IGNORECASE) is not None


def final_text(caption: str | None, config: DataConfig) -> str:
    """The text a photo is trained with: its caption, with the name in front where the trigger is missing.

    A photo without a caption gets the instance prompt.
    """
    return _with_trigger(caption, config) if caption else instance_prompt(config)


def _with_trigger(text: str, config: DataConfig) -> str:
    return text if has_trigger(text, config) else f"{config.name}, {text}"


def variants(text: str, config: DataConfig, seed: str) -> list[str]:
    """The texts a photo alternates between, its own first: with `data.shuffle_tags`, up to `SHUFFLES` orders of tags.

    The tag with the trigger stays first.

    Args:
        seed: anything that names the run and the photo; the same seed gives the same texts.
    """
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    if not config.shuffle_tags or len(tags) < 2:
        return [text]
    first = [tag for tag in tags if config.trigger and has_trigger(tag, config)][:1]
    rest = list(tags)
    for tag in first:
        rest.remove(tag)
    draw = random.Random(f"{seed}/tags")
    texts = [text]
    for _ in range(4 * SHUFFLES):
        if len(texts) == SHUFFLES:
            break
        # Sorted by random keys: `random.shuffle` may change between versions of Python, `random.random` may not.
        order = sorted(rest, key=lambda _: draw.random())
        shuffled = ", ".join([*first, *order])
        if shuffled not in texts:
            texts.append(shuffled)
    return texts


def mentions_sides(text: str) -> bool:
    """Whether the text says left or right, which a mirrored photo makes untrue."""
    return re.search(r"(?<!\w)(left|right)(?!\w)", text, re.IGNORECASE) is not None


class TokenCounter:
    """Counts tokens as the base's text encoder will, without loading it.

    Args:
        folder: the base's `tokenizer` folder, with tokenizer.json or with vocab.json and merges.txt.
        limit: positions of the text encoder (77 for CLIP), the start and the end token included.

    Raises:
        LorakitError: there is no tokenizer in the folder.
    """

    def __init__(self, folder: Path, limit: int):
        self.limit = limit - 2
        self._tokenizer = _load(folder)

    def count(self, text: str) -> tuple[int, str]:
        """The number of tokens of the text, and the part of it that is cut off ("" where it fits)."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        count = len(encoding.ids)
        return count, text[encoding.offsets[self.limit][0] :].strip() if count > self.limit else ""


def _load(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise LorakitError(f"{folder}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt)")
    return _clip(folder)


def _clip(folder: Path) -> Tokenizer:
    """CLIP's tokenizer from its two original files, as transformers builds it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
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
