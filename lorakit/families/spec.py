"""The facts of a family of base models as data: one `FamilySpec` in each `families/<name>/spec.py`. No torch.

`registry.FAMILIES` names the specs; how a base is recognised, which layers are adapted, what files are called and what
memory a run takes follow from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.core.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.core.safetensors_header import Header
    from lorakit.families.ldm import Names, Prediction

Shapes = Mapping[str, Sequence[int]]
# Component -> its configuration.
Configs = dict[str, dict[str, Any]]

EPSILON, VELOCITY, FLOW = "epsilon", "v_prediction", "flow_prediction"
# Prediction type -> what ModelSpec calls it.
MODELSPEC_PREDICTIONS = {EPSILON: "epsilon", VELOCITY: "v", FLOW: "flow"}


class LayerUse(NamedTuple):
    """How often a layer of the denoiser is applied in a forward pass for one picture.

    Attributes:
        name: canonical name.
        shape: of its weight.
        places: how often the weight is applied: to each latent cell, to each token, or once.
        attended: pairs of query and key, of a layer that makes an attention's queries; else 0.
    """

    name: str
    shape: Sequence[int]
    places: int
    attended: int = 0


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder.

    Attributes:
        name: its folder in diffusers layout; its tokenizer's is `tokenizer` for `text_encoder`, and so on.
        kind: "CLIP" or "T5".
        trainable: whether an adapter may enter it and words may be learned in it.
        optional: whether a base may do without, where model_index.json says so.
        extra_tokens: tokens that the denoiser attends to beside CLIP's.
    """

    name: str
    kind: str = "CLIP"
    trainable: bool = True
    optional: bool = False
    extra_tokens: int = 0

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer in diffusers layout."""
        return self.name.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class KohyaNames:
    """How layers are named in kohya files.

    Attributes:
        sgm: whether blocks of the UNet have sgm's names; else diffusers'.
        text: text encoder -> prefix.
        conv_projections: whether `proj_in` and `proj_out` are 1x1 convolutions.
        denoiser: of a denoiser that is no UNet, canonical name -> name; `*` is a block's number.
        fused: canonical name of a layer that files have in one -> those that lorakit has, which are equal shares of its
            rows.
        swapped: endings of layers the halves of whose rows are the other way round in files, where these are twice as
            many as the columns.
    """

    sgm: bool
    text: Mapping[str, str]
    conv_projections: bool = False
    denoiser: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tags:
    """What sd-scripts, ModelSpec and the sidecar of A1111 call a family; `_v` of a base that predicts v."""

    version: str
    architecture: str
    label: str
    version_v: str = ""
    architecture_v: str = ""
    v2: str = "False"
    implementation: str = "diffusers"

    def of(self, prediction_type: str) -> tuple[str, str]:
        """sd-scripts' version and ModelSpec's architecture of a base that predicts this."""
        if prediction_type == VELOCITY:
            return self.version_v or self.version, self.architecture_v or self.architecture
        return self.version, self.architecture


@dataclass(frozen=True)
class Reads:
    """What one program reads of the adapters of a family.

    Attributes:
        names: patterns of the module names that it reads.
        complete_attention: prefixes whose q, k, v and out must all be there, or the layer is dropped.
        ordered_attention: prefixes of which it reads q, k, v in this order up to the first that is missing.
    """

    names: tuple[str, ...]
    complete_attention: tuple[str, ...] = ()
    ordered_attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class FilePart:
    """How one component lies in a base that is a single file.

    Attributes:
        prefixes: what stands before its tensors' names; where there are several, the first is the usual one.
        tensors: pattern of diffusers' names of the tensors that it has.
        names: (shapes, theirs) -> the file's name of a module or tensor -> diffusers' (see `ldm.Names`), from the names
            in the file (`theirs`) or from diffusers'; None where both are the same.
        level: what diffusers' names begin with and some files leave out.
        partial: pattern of what some of its blocks lack; a block has all that is of one group of it, or nothing.
        used_layers: how many of its layers the published model reads, where that is one less than it has; the rest is
            not in diffusers layout.
        optional: whether a file may do without.
        identity: a matrix that diffusers has and no file, as it is the identity; and a tensor that is as wide.
    """

    prefixes: tuple[str, ...]
    tensors: str
    names: Callable[[Shapes, bool], Names] | None = None
    level: str = ""
    partial: str = "conv_shortcut"
    used_layers: int | None = None
    optional: bool = False
    identity: tuple[str, str] | None = None


@dataclass(frozen=True)
class FileLayout:
    """How bases of one version lie in a single file.

    Attributes:
        parts: component -> how it lies there.
        marks: beginnings of names that tell the version.
        configs: (component -> shapes, prediction type, zero terminal SNR) -> component -> what its config.json in
            diffusers layout would say; with "scheduler" and "model_index".
        others: beginning of a name -> what model has such names beside these.
        guess: what the model predicts where neither a key nor the metadata says so.
        scaling_factor: of its latents.
        vae_names: pattern of the names of published autoencoders for it, which do not tell their scale.
    """

    parts: Mapping[str, FilePart]
    marks: tuple[str, ...]
    configs: Callable[[Mapping[str, Shapes], str, bool], Configs]
    others: Mapping[str, str] = field(default_factory=dict)
    guess: Callable[[Header], Prediction] | None = None
    scaling_factor: float | None = None
    vae_names: str = "(?!)"


@dataclass(frozen=True)
class ModelVersion:
    """Bases with interchangeable adapters: a family, or the part of it that has one width.

    Attributes:
        name: what adapters for it are called: "sd1".
        title: for a person: "Stable Diffusion 1".
        preset: what the presets for it are called behind "subject-" and "style-".
        cross_dim: width of the text that the denoiser attends to, where that tells the version.
        kohya: names in kohya files.
        tags: what files say they are for.
        tag_prefixes: what `ss_base_model_version` and `modelspec.architecture` of its adapters begin with.
        key_prefixes: names of modules that only its adapters have begin with one of these.
        readers: program (a key of `compatibility.CONSUMERS`) -> what it reads; one that is absent reads nothing.
        layout: how its bases lie in a single file; None where they are read as folders only.
    """

    name: str
    title: str
    preset: str
    kohya: KohyaNames
    tags: Tags
    tag_prefixes: tuple[str, str]
    readers: Mapping[str, Reads]
    cross_dim: int | None = None
    key_prefixes: tuple[str, ...] = ()
    layout: FileLayout | None = None


@dataclass(frozen=True)
class FamilySpec:
    """A family of base models that one class loads and that train alike.

    Attributes:
        name: its key in `registry.FAMILIES`.
        pipeline: what the name of a pipeline class in model_index.json begins with; the longest that fits counts.
        loader: "module:Class" of the `families.Family`.
        text_encoders: in the order of their names.
        versions: the first is meant where nothing tells.
        denoiser: the denoiser's folder in diffusers layout, and its name in diffusers' and PEFT's files. Here and in
            kohya files it is the "unet" whatever it is.
        denoiser_class: its class in diffusers.
        prediction: the prediction type, or None where the scheduler's configuration says.
        target_patterns: `adapter.target_modules` -> pattern of the denoiser's layers, without "unet" in front.
        layer_uses: (layers, height, width, text tokens) -> use of each layer for a picture of so many latent cells.
        bucket_multiple: (layers, pixels to a latent) -> what the sides of a bucket must be multiples of, in pixels.
        block_layers: the denoiser's layers that programs read, where they are not those of Stable Diffusion's UNet.
        clip_skip: its text encoders are read at so many layers from the end, 1 the last, unless `model.clip_skip` says
            otherwise; None where it cannot: no program reads them elsewhere.
        chunked_texts: whether programs read long texts of its CLIP encoders in chunks.
        dead_end_layers: endings of layers whose output nothing reads in the last block.
        format_refusals: format and kind of layers -> why it cannot carry such adapters of this family.
        guidance: classifier-free guidance of samples where nothing else is said.
    """

    name: str
    pipeline: str
    loader: str
    text_encoders: tuple[TextEncoder, ...]
    versions: tuple[ModelVersion, ...]
    target_patterns: Mapping[str, str]
    layer_uses: Callable[[Shapes, int, int, int], list[LayerUse]]
    bucket_multiple: Callable[[Shapes, int], int]
    denoiser: str = "unet"
    denoiser_class: str = "UNet2DConditionModel"
    prediction: str | None = None
    block_layers: re.Pattern[str] | None = None
    clip_skip: int | None = None
    chunked_texts: bool = True
    dead_end_layers: tuple[str, ...] = ()
    format_refusals: Mapping[tuple[str, str], str] = field(default_factory=dict)
    guidance: float = 7.5

    @property
    def predicts_flow(self) -> bool:
        """Whether its bases are trained by flow matching: they have no signal-to-noise weights and no other type."""
        return self.prediction == FLOW

    def text_layer(self, title: str, clip_skip: int | None, layers: int) -> int:
        """The layer, from the end, that texts are read at; 0 where the family has no choice.

        Args:
            clip_skip: as `model.clip_skip`.
            layers: of the shortest text encoder.

        Raises:
            LorakitError: its texts are not read there.
        """
        own = self.clip_skip
        if clip_skip is not None and own is None:
            raise LorakitError(
                "base {name}: no program reads its texts at another layer: leave model.clip_skip unset", title
            )
        if clip_skip is not None and own is not None and not own <= clip_skip <= layers:
            raise LorakitError(
                "base {name}: model.clip_skip must be {own} (its own) to {layers}, not {skip}",
                title,
                own,
                layers,
                clip_skip,
            )
        return clip_skip or own or 0

    def version(self, cross_dim: int | None) -> ModelVersion:
        """The version with this width of the text; the first if there is none."""
        return next((version for version in self.versions if version.cross_dim == cross_dim), self.versions[0])

    def trainable_encoders(self) -> tuple[str, ...]:
        """The text encoders that an adapter may enter."""
        return tuple(encoder.name for encoder in self.text_encoders if encoder.trainable)

    def weight_stems(self) -> dict[str, str]:
        """Folder of a part with weights in diffusers layout -> what the names of its files begin with."""
        model = dict.fromkeys((self.denoiser, "vae"), "diffusion_pytorch_model")
        return model | {encoder.name: "model" for encoder in self.text_encoders}
