"""Functions that the families share: load components, tokenize texts, encode and decode pictures, move parts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from lorakit.core import prompt_syntax, safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.engine import quantized_weight
from lorakit.families import ldm, tiled_vae
from lorakit.families.describe import BaseInfo

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin
    from transformers import CLIPTokenizer, PreTrainedModel

    from lorakit.core.prompt_syntax import Prompt
    from lorakit.families.vae_source import Source

# Parts of a base stay here until they are needed.
HOST = torch.device("cpu")
# float16 ends at 6e-8, and the gradient of a mean over a latent's values starts at about 1e-4. A fixed power of two
# needs no rounding and, unlike an adaptive scale, no inspection of the gradients; an overflow is found like any other
# NaN.
FP16_GRADIENT_SCALE = 2.0**13


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers and transformers show no progress bars or log lines. Their settings are restored on exit."""
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (bar, verbosity) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def load_module(info: BaseInfo, component: str, cls: Any, dtype: torch.dtype) -> Any:
    """Load one component, frozen, in eval mode, in `dtype`, on the CPU.

    Raises:
        LorakitError: its weights do not fit its configuration.
    """
    if info.components:
        return share(info.components[component], dtype)
    try:
        source = info.weights(component)
        if source.slots is not None:
            module = _from_file(source, info.configs[component], component, cls, dtype)
        else:
            module = cls.from_pretrained(
                source.path,
                dtype=dtype,
                variant=source.variant,
                use_safetensors=True,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if component in info.sources:
            path = info.sources[component].path
            raise LorakitError("cannot load {part} {path}: {why}", component, path, reason[:200]) from error
        raise LorakitError("cannot load {part} of base {path}: {why}", component, info.path, reason[:200]) from error
    return module.eval().requires_grad_(False)


def share(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the module, frozen and in eval mode, that shares its weights (or copies them if the dtype differs).

    Changing the copy's layers or moving it to another device does not affect the original.
    """
    full = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    weights: dict[int, torch.Tensor] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        cast = tensor.is_floating_point() and full.isdisjoint(name.split("."))
        weight = tensor.detach().to(dtype) if cast else tensor.detach()
        weights[id(tensor)] = nn.Parameter(weight, False) if isinstance(tensor, nn.Parameter) else weight
    return copy.deepcopy(module, weights).eval().requires_grad_(False)


def _from_file(source: Source, config: dict[str, Any], component: str, cls: Any, dtype: torch.dtype) -> Any:
    """Load a part of a single file: build it without weights, then read these one by one in `dtype`."""
    slots, header = source.slots or {}, safetensors_header.read(source.path)
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in ldm.tensors(header, slots)}
    if not component.startswith("text_encoder"):
        with torch.device("meta"):
            module = cls.from_config(config)
        module.load_state_dict(weights, assign=True)
        return module
    # transformers creates the buffers that are in no file, and knows the names of weights in its own version.
    module, loading_info = cls.from_pretrained(
        None, config=cls.config_class(**config), state_dict=weights, dtype=dtype, output_loading_info=True
    )
    wrong = sorted(loading_info["missing_keys"] | loading_info["unexpected_keys"])
    if wrong:
        raise ValueError(Message("{wrong} is missing or unknown", wrong[0]))
    return module


def load_unet(
    info: BaseInfo,
    device: torch.device,
    dtype: torch.dtype,
    storage: str = "full",
    stream: bool = False,
) -> Any:
    """The denoiser, with full weights or quantized by `lorakit.engine.quantized_weight`."""
    unet = load_module(info, "unet", getattr(diffusers, info.spec.denoiser_class), dtype)
    if storage == "full" and not stream:
        return unet
    # Each weight is quantized on the device one by one, so the device never holds the full UNet.
    quantized_weight.store_layers(unet, storage, device, offload=stream)
    return unet.to(HOST)


def load_vae(info: BaseInfo) -> AutoencoderKL:
    """Load the autoencoder in float32, because SDXL's overflows in half precision. It casts its input, so that a
    half-precision pipeline can use it."""
    vae = load_module(info, "vae", AutoencoderKL, torch.float32)
    first = vae.decoder if vae.post_quant_conv is None else vae.post_quant_conv
    first.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    return vae


def mask_everything(unet: Any, vae: AutoencoderKL) -> None:
    """Make an inpainting UNet accept plain latents, in training and in text-to-image pipelines. Other UNets do not
    change.

    The other input channels are the mask and the latents of the picture with its masked area grey (Rombach et al. 2022,
    arXiv 2112.10752; diffusers' StableDiffusionInpaintPipeline). With everything masked they are the same for every
    photo. A quarter of such a model's own training used full masks.
    """
    latent = unet.config.out_channels
    if unet.config.in_channels != 2 * latent + 1:
        return
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    grey: dict[tuple[int, ...], torch.Tensor] = {}

    def complete(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        noisy, *rest = inputs
        if noisy.shape[1] != latent:
            return None
        sides = tuple(noisy.shape[2:])
        if sides not in grey:
            grey[sides] = encode_image(vae, torch.zeros((1, 3, *(side * scale for side in sides))))[0]
        blank = grey[sides].to(noisy).expand(len(noisy), -1, -1, -1)
        return torch.cat([noisy, torch.ones_like(noisy[:, :1]), blank], dim=1), *rest

    unet.conv_in.register_forward_pre_hook(complete)


def load_tokenizer(info: BaseInfo, component: str, encoder: PreTrainedModel) -> CLIPTokenizer:
    """Load a CLIP tokenizer that fits its text encoder.

    Raises:
        LorakitError: the vocabulary is broken; transformers would load an almost empty tokenizer without a warning.
    """
    folder = info.tokenizer(component)
    in_file = info.weights(component.replace("tokenizer", "text_encoder")).slots is not None
    if in_file and (folder / "vocab.json").is_file():
        # Only the vocabulary is used: the padding token of the place that it is from may differ from the base's.
        tokenizer = transformers.CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    else:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    words, rows = len(tokenizer), encoder.config.vocab_size
    if not 256 <= words <= rows or (in_file and words != rows):
        if in_file:
            own = "set model.tokenizer to the folder of the base's own"
            raise LorakitError(
                "tokenizer {folder} knows {count} words where its text encoder has {words}: {advice}",
                *(folder, words, rows, own),
            )
        raise LorakitError(
            "{name} of base {path} knows {count} words where its text encoder has {rows}: get the base again",
            *(component, info.path, words, rows),
        )
    if in_file:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(encoder.config.pad_token_id)
    tokenizer.model_max_length = info.max_tokens
    return tokenizer


class TokenIds:
    """Token ids of texts, padded as in the diffusers pipelines and cached on the device.

    A long text is split into chunks of `length` tokens, each with its own start and end, which are concatenated, as in
    A1111, ComfyUI and sd-scripts (`max_token_length`). A text with fewer chunks than others gets empty ones.

    Args:
        length: tokens of a chunk, including start and end; by default the tokenizer's.
        chunked: False if a text encoder reads only one chunk of a text.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, device: torch.device, length: int | None = None, *, chunked: bool = True
    ):
        self.tokenizer, self.device, self.length = tokenizer, device, length or tokenizer.model_max_length
        self.chunked = chunked
        self._begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._word: list[int] = []
        self._places = 0
        self._ids: dict[tuple[str | Prompt, int], torch.Tensor] = {}

    def reserve(self, word: str, places: int) -> None:
        """Reserve `places` tokens of a chunk for a word, one for each learned vector; 0 for no word."""
        self._word = self.tokenizer(word, add_special_tokens=False).input_ids if places else []
        self._places = max(places, len(self._word))
        self._ids.clear()

    def __call__(self, texts: Sequence[str | Prompt], chunks: int = 1) -> torch.Tensor:
        """Token ids, int64 `[B, chunks * length]`; longer texts are truncated."""
        for text in texts:
            if (text, chunks) not in self._ids:
                rows = [id for id, _ in self._row(text, chunks)]
                self._ids[text, chunks] = torch.tensor(rows, device=self.device)
        return torch.stack([self._ids[text, chunks] for text in texts])

    def weights(self, prompt: Prompt, chunks: int = 1) -> torch.Tensor:
        """The weight of each of these ids, `[chunks * length]`."""
        return torch.tensor([weight for _, weight in self._row(prompt, chunks)], device=self.device)

    def chunks(self, text: str | Prompt) -> int:
        """The number of chunks of the full text."""
        return len(self._chunks(text)) if self.chunked else 1

    def _row(self, text: str | Prompt, chunks: int) -> list[tuple[int, float]]:
        """The ids of `chunks` chunks, with their weights."""
        row: list[tuple[int, float]] = []
        parts = self._chunks(text)[:chunks]
        for part in (*parts, *([] for _ in range(chunks - len(parts)))):
            ids = [*((id, 1.0) for id in self._begin), *part, (int(self.tokenizer.eos_token_id), 1.0)]
            row += [*ids, *([(int(self.tokenizer.pad_token_id), 1.0)] * (self.length - len(ids)))]
        return row

    def _chunks(self, text: str | Prompt) -> list[list[tuple[int, float]]]:
        """The text's own ids with their weights, by chunk; a reserved word is never split."""
        groups = prompt_syntax.literal(text) if isinstance(text, str) else text
        if not self.chunked:
            groups = (tuple(part for group in groups for part in group),)
        room, word = self.length - len(self._begin) - 1, self._word
        chunks: list[list[tuple[int, float]]] = []
        for group in groups:
            ids = [
                (id, part.weight)
                for part in group
                for id in self.tokenizer(part.text, add_special_tokens=False).input_ids
            ]
            place, left = 0, 0
            while place < len(ids):
                is_word = bool(word) and [id for id, _ in ids[place : place + len(word)]] == word
                width, places = (len(word), self._places) if is_word else (1, 1)
                if places > left:
                    chunks.append([])
                    left = room
                chunks[-1] += ids[place : place + width]
                place, left = place + width, left - places
        return chunks or [[]]


def chunk_rows(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Ids `[B, n * length]` as the input of a text encoder: `[B * n, length]`."""
    return ids.reshape(-1, length)


def join_chunks(states: torch.Tensor, count: int) -> torch.Tensor:
    """The states of `chunk_rows` of `count` texts, with the chunks of a text concatenated: `[count, ., D]`."""
    return states.reshape(count, -1, states.shape[-1])


def first_chunks(pooled: torch.Tensor, count: int) -> torch.Tensor:
    """The pooled output `[B * n, P]` of each text's first chunk; A1111 and ComfyUI use only that one."""
    return pooled.reshape(count, -1, pooled.shape[-1])[:, 0]


def load_scheduler(info: BaseInfo) -> SchedulerMixin:
    """The base's scheduler, for sampling; `describe` refuses one that diffusers lacks."""
    config = dict(info.configs["scheduler"])
    return getattr(diffusers, config["_class_name"]).from_config(config)


def noise_schedule(scheduler: SchedulerMixin, device: torch.device) -> torch.Tensor:
    """alphas_cumprod, float32 `[1000]`, of the model's training; with zero terminal SNR (Lin et al. 2023, arXiv
    2305.08891) if the configuration has `rescale_betas_zero_snr`.

    Samplers round that zero up; in training it is exact.
    """
    return DDPMScheduler.from_config(scheduler.config).alphas_cumprod.to(device, torch.float32)  # type: ignore[no-any-return]


def latent_scale(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """(offset, factor), each broadcastable to `[B, C, h, w]`: the UNet's latents are (the VAE's latents - offset) *
    factor."""
    config = vae.config
    factor = torch.tensor(float(config.scaling_factor), device=vae.device)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[f"latents_{name}"], device=vae.device) for name in ("mean", "std"))
        return mean.float().reshape(1, -1, 1, 1), factor / std.float().reshape(1, -1, 1, 1)
    return torch.tensor(float(config.get("shift_factor") or 0.0), device=vae.device), factor


@torch.no_grad()
def encode_image(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Family.encode_image`."""
    if tiled_vae.fits(vae, pixels[:, 0].numel(), tiled_vae.ENCODING):
        posterior = vae.encode(pixels.to(vae.device, torch.float32)).latent_dist
    else:
        posterior = DiagonalGaussianDistribution(tiled_vae.encode(vae, pixels))
    offset, factor = latent_scale(vae)
    return (posterior.mean - offset) * factor, posterior.std * factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """See `Family.decode`."""
    offset, factor = latent_scale(vae)
    latents = latents.to(vae.device, torch.float32) / factor + offset
    pixels = latents[:, 0].numel() * 4 ** (len(vae.config.block_out_channels) - 1)
    fits = tiled_vae.fits(vae, pixels, tiled_vae.DECODING)
    return vae.decode(latents).sample if fits else tiled_vae.decode(vae, latents)


def gradient_scale(dtype: torch.dtype) -> float:
    """See `Family.gradient_scale`."""
    return FP16_GRADIENT_SCALE if dtype is torch.float16 else 1.0


def widen(prediction: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """The UNet's output in float32. Its gradient is multiplied by `scale` before it is rounded to the UNet's dtype."""
    prediction = prediction.float()
    if prediction.requires_grad and (isinstance(scale, torch.Tensor) or scale != 1):
        prediction.register_hook(lambda gradient: gradient * scale)
    return prediction


def by_name(unet: nn.Module, vae: AutoencoderKL, text_encoders: dict[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Name -> modules, for `move`: "unet", "vae", "text_encoders", and the name of each text encoder."""
    each = {name: [encoder] for name, encoder in text_encoders.items()}
    return {"unet": [unet], "vae": [vae], "text_encoders": list(text_encoders.values()), **each}


def move(parts: dict[str, list[nn.Module]], names: tuple[str, ...], device: torch.device) -> None:
    """Move parts of a base to `device`; parts that are there already cost almost nothing.

    A part with trained weights is not moved to the CPU: the optimizer and CUDA graphs hold its addresses.

    Args:
        parts: the result of `by_name`.

    Raises:
        ValueError: a name is not in `parts`.
    """
    changed = False
    for name in names:
        if name not in parts:
            raise ValueError(Message("unknown component {name!r}: {names}", name, ", ".join(map(repr, parts))))
        away = [module for module in parts[name] if next(module.parameters()).device.type != device.type]
        if device.type == "cpu" and any(w.requires_grad for module in away for w in module.parameters()):
            continue
        for module in away:
            module.to(device)
            changed = True
    if changed and device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()
