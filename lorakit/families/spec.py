"""The facts of a family of base models as data: one `FamilySpec` in each `families/<name>/spec.py`. No torch.

`registry.FAMILIES` names the specs. Recognition of bases, target layers, file names and memory estimates are derived
from them.
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
# Prediction type -> its name in ModelSpec.
MODELSPEC_PREDICTIONS = {EPSILON: "epsilon", VELOCITY: "v", FLOW: "flow"}


class LayerUse(NamedTuple):
    """How often a layer of the denoiser is applied in a forward pass for one picture.

    Attributes:
        name: canonical name.
        shape: shape of its weight.
        places: how often the weight is applied: for each latent cell, for each token, or once.
        attended: number of query-key pairs if the layer computes the queries of an attention, else 0.
    """

    name: str
    shape: Sequence[int]
    places: int
    attended: int = 0


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder.

    Attributes:
        name: its folder in diffusers layout. Its tokenizer's folder is `tokenizer` for `text_encoder`, and so on.
        kind: "CLIP" or "T5".
        trainable: whether it can be adapted and learn words.
        optional: whether a base can lack it, if its model_index.json says so.
        extra_tokens: tokens that the denoiser attends to in addition to CLIP's.
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
    """Names of layers in kohya files.

    Attributes:
        sgm: whether the UNet's blocks have sgm's names, else diffusers'.
        text: text encoder -> prefix.
        conv_projections: whether `proj_in` and `proj_out` are 1x1 convolutions.
        denoiser: for a denoiser that is not a UNet, canonical name -> name; `*` is a block's number.
        fused: canonical name of a layer that is one in files -> the layers in lorakit, which are equal shares of its
            rows.
        swapped: suffixes of layers whose rows have their halves exchanged in files, if there are twice as many rows as
            columns.
    """

    sgm: bool
    text: Mapping[str, str]
    conv_projections: bool = False
    denoiser: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tags:
    """The names of a family in sd-scripts, ModelSpec and A1111's sidecar; fields with `_v` are for v-prediction."""

    version: str
    architecture: str
    label: str
    version_v: str = ""
    architecture_v: str = ""
    v2: str = "False"
    implementation: str = "diffusers"

    def of(self, prediction_type: str) -> tuple[str, str]:
        """sd-scripts' version and ModelSpec's architecture of a base with this prediction type."""
        if prediction_type == VELOCITY:
            return self.version_v or self.version, self.architecture_v or self.architecture
        return self.version, self.architecture


@dataclass(frozen=True)
class Reads:
    """The modules that one program reads in the adapters of a family.

    Attributes:
        names: patterns of the module names that it reads.
        complete_attention: prefixes whose layers are dropped unless q, k, v and out all exist.
        ordered_attention: prefixes whose q, k, v are read in this order up to the first missing one.
    """

    names: tuple[str, ...]
    complete_attention: tuple[str, ...] = ()
    ordered_attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class FilePart:
    """The layout of one component in a base that is a single file.

    Attributes:
        prefixes: prefixes of its tensors' names; the first is the usual one.
        tensors: pattern of its tensors' names in diffusers.
        names: (shapes, theirs) -> {name of a module or tensor in the file: name in diffusers} (see `ldm.Names`).
            `theirs`: the shapes have the file's names. None if both names are the same.
        level: prefix of diffusers' names that some files leave out.
        partial: pattern of tensors that some blocks lack; a block has all tensors of one group of it, or none.
        used_layers: number of layers that the published model uses, if it has one more; diffusers layout lacks the
            rest.
        optional: whether a file can lack it.
        identity: an identity matrix that diffusers has but files lack, and a tensor of the same width.
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
    """The layout of a version's bases in a single file.

    Attributes:
        parts: component -> its layout.
        marks: prefixes of names that identify the version.
        configs: (component -> shapes, prediction type, zero terminal SNR) -> component -> its config.json in diffusers
            layout; with "scheduler" and "model_index".
        others: prefix of a name -> the other model that has such names.
        guess: returns the prediction type if neither a key nor the metadata has it.
        scaling_factor: scaling factor of its latents.
        vae_names: pattern of the file names of published autoencoders for it; such files lack the scaling factor.
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
    """Bases with interchangeable adapters: a family, or those of its bases with one text width.

    Attributes:
        name: its name in adapters: "sd1".
        title: its name in messages: "Stable Diffusion 1".
        preset: suffix of its presets, after "subject-" and "style-".
        cross_dim: width of the text embeddings, if it identifies the version.
        kohya: names in kohya files.
        tags: its names in files' metadata.
        tag_prefixes: prefixes of `ss_base_model_version` and `modelspec.architecture` in its adapters.
        key_prefixes: prefixes of module names that only its adapters have.
        readers: program (a key of `compatibility.CONSUMERS`) -> what it reads; absent programs read nothing.
        layout: layout of its bases in a single file; None if they are read only as folders.
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
    """A family of base models that one class loads and trains.

    Attributes:
        name: its key in `registry.FAMILIES`.
        pipeline: prefix of the pipeline class in model_index.json; the longest match counts.
        loader: "module:Class" of its `families.Family`.
        text_encoders: in the order of their names.
        versions: its versions; the first is the default.
        denoiser: folder of the denoiser in diffusers layout, and its name in diffusers' and PEFT's files. Here and in
            kohya files it is always "unet".
        denoiser_class: its class in diffusers.
        prediction: the prediction type, or None if the scheduler's configuration has it.
        target_patterns: `adapter.target_modules` -> pattern of the denoiser's layers, without the prefix "unet".
        layer_uses: (layers, height, width, text tokens) -> use of each layer for a picture of height x width latent
            cells.
        bucket_multiple: (layers, pixels per latent) -> multiple for the sides of a bucket, in pixels.
        block_layers: the denoiser's layers that programs read, if they are not those of Stable Diffusion's UNet.
        clip_skip: layer that its text encoders are read at by default, counted from the end (1 is the last); None if no
            program reads another one.
        chunked_texts: whether programs encode long texts in chunks.
        dead_end_layers: suffixes of layers whose output is unused in the last block.
        format_refusals: (format, kind of layers) -> why the format cannot hold such adapters of this family.
        guidance: default guidance scale of samples.
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
        """Whether its bases use flow matching: they have no signal-to-noise weights and no other prediction type."""
        return self.prediction == FLOW

    def text_layer(self, title: str, clip_skip: int | None, layers: int) -> int:
        """The layer that texts are read at, counted from the end; 0 if the family has no choice.

        Args:
            clip_skip: the value of `model.clip_skip`.
            layers: number of layers of the shortest text encoder.

        Raises:
            LorakitError: texts of the family cannot be read at this layer.
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
        """The version with this text width, else the first one."""
        return next((version for version in self.versions if version.cross_dim == cross_dim), self.versions[0])

    def trainable_encoders(self) -> tuple[str, ...]:
        """The text encoders that can be adapted."""
        return tuple(encoder.name for encoder in self.text_encoders if encoder.trainable)

    def weight_stems(self) -> dict[str, str]:
        """Folder of a part with weights in diffusers layout -> prefix of its files' names."""
        model = dict.fromkeys((self.denoiser, "vae"), "diffusion_pytorch_model")
        return model | {encoder.name: "model" for encoder in self.text_encoders}
