"""Captioning models of transformers: BLIP, GIT, Florence-2, and chat models (SmolVLM, Qwen-VL, LLaVA)."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.config import MemoryConfig
from lorakit.core import install
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.families import weight_files
from lorakit.inference.captioners.spec import CaptionerSpec, CaptionOptions

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

WEIGHTS = re.compile(r"model(\.safetensors\.index\.json|(-\d+-of-\d+)?\.safetensors)")
SMALL = (".json", ".txt", ".model", ".jinja")
# Default prompts: QUESTION for models with a chat template, their own for these, none for others.
QUESTION = "Describe this picture in one sentence, in plain words, for training an image generator. Only the sentence."
OWN_PROMPTS = {"florence2": "<DETAILED_CAPTION>", "paligemma": "caption en", "kosmos-2": "An image of"}
# This type has a tokenizer and an image processor, but no common processor.
SEPARATE = "vision-encoder-decoder"


def files(names: Collection[str]) -> list[str]:
    """The weights (safetensors), configs and vocabularies among a model's files."""
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    if "config.json" not in names or not weights:
        return []
    return weights + [name for name in names if "/" not in name and name.endswith(SMALL) and name not in weights]


class ImageTextModel:
    """A loaded model. Call it with a picture; it returns a text.

    Args:
        processor: the model's processor, or its image processor if it has no common one.
        tokenizer: decodes the text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        tokenizer: PreTrainedTokenizerBase,
        options: CaptionOptions,
    ):
        self.model, self.processor, self.tokenizer, self.options = model, processor, tokenizer, options
        self._is_chat = bool(getattr(processor, "chat_template", None))
        self._prompt = options.prompt or OWN_PROMPTS.get(model.config.model_type, QUESTION if self._is_chat else "")

    def __call__(self, image: Image.Image) -> str:
        """Describe a picture."""
        import torch

        inputs = self._inputs(image).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.options.max_tokens, do_sample=False)
        # Models that continue a text also return the prompt.
        start = inputs.get("input_ids")
        if start is not None and ids.shape[1] >= start.shape[1] and torch.equal(ids[:, : start.shape[1]], start):
            ids = ids[:, start.shape[1] :]
        return " ".join(str(self.tokenizer.decode(ids[0], skip_special_tokens=True)).split())

    def _inputs(self, image: Image.Image) -> BatchFeature:
        if not self._is_chat:
            prompt = {"text": self._prompt} if self._prompt and self.processor is not self.tokenizer else {}
            return self.processor(images=image, return_tensors="pt", **prompt)
        content = [{"type": "image", "image": image}, {"type": "text", "text": self._prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


def load(folder: Path, options: CaptionOptions, memory: MemoryConfig) -> ImageTextModel:
    """Load a model from its folder.

    Raises:
        LorakitError: it is not a captioning model, needs code or packages that are missing, or is damaged.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

    from lorakit.engine import device as devices

    config = weight_files.read_json(folder / "config.json")
    kind = str(config.get("model_type", ""))
    if kind not in KINDS:
        raise LorakitError("captioner {model}: {problem}", folder, _other(kind, "auto_map" in config))
    device = devices.device(memory)
    devices.prepare(memory, device)
    try:
        if kind == SEPARATE:
            if options.prompt:
                raise LorakitError("captioner {model}: this model takes no --prompt; leave it out", folder)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        else:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            tokenizer = processor.tokenizer
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=devices.dtype(memory, device),
            output_loading_info=True,
        )
    except ImportError as error:
        text = "captioner {model}: needs more packages ({reason}); {hint}"
        raise LorakitError(text, folder, _first(error), install.hint("vlm")) from None
    except LorakitError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise LorakitError(
            "captioner {model}: cannot be loaded ({reason}); get the model again", folder, _first(error)
        ) from error
    if info["missing_keys"]:
        absent = sorted(info["missing_keys"])
        raise LorakitError(
            "captioner {model}: its weights lack tensors, such as {name} ({count} in all); get the model again",
            *(folder, absent[0], len(absent)),
        )
    return ImageTextModel(model.to(device).eval(), processor, tokenizer, options)


def _other(kind: str, has_code: bool) -> str:
    if has_code:
        return Message(
            "a model ({kind}) that needs code of its own, which lorakit does not run; give one that transformers has, "
            "such as florence-community/Florence-2-base",
            kind or "of no type",
        )
    text = "a model of the type {kind} is no captioner; give BLIP, Florence-2, SmolVLM or Qwen-VL"
    return Message(text, kind or "(none)")


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


SPEC = CaptionerSpec(files, load)
