"""The example family as data: a UNet and a CLIP text encoder as in Stable Diffusion 1. This module imports no torch."""

from lorakit.families import unet
from lorakit.families.spec import FamilySpec, KohyaNames, ModelVersion, Reads, Tags, TextEncoder
from lorakit.families.unet import ALL_BLOCKS, DOTTED_ALL, TE

# Adapters of one version fit every base of that version. A family has several versions if its bases differ only in the
# width of the text embeddings (`cross_dim`) and in names; see families/sd/spec.py.
EXAMPLE = ModelVersion(
    # The name of the version in adapter files and messages. It must be unique among all families.
    name="example",
    title="Example Diffusion",
    # The presets "subject-<preset>" and "style-<preset>" suit it.
    preset="sd15",
    # Names in kohya files: a prefix for each text encoder; diffusers' or sgm's names for the blocks of the UNet.
    kohya=KohyaNames(sgm=False, text={"text_encoder": "lora_te_"}, conv_projections=True),
    # Its names in sd-scripts, ModelSpec and A1111's sidecar; these strings go into the metadata of every adapter.
    tags=Tags("example_v1", "example-diffusion-v1/lora", "Example"),
    # Prefixes by which an adapter's metadata is recognized. Tags of other families must not start with them.
    tag_prefixes=("example_v1", "example-diffusion-v1"),
    # Program -> the module names that it reads, from its source or measured. A program that is absent reads nothing.
    readers={"diffusers": Reads((*ALL_BLOCKS, *TE, *DOTTED_ALL)), "peft": Reads(DOTTED_ALL)},
    # The layout of its bases in a single file; None: they are read only as folders. See families/sd/single_file.py.
    layout=None,
)

SPEC = FamilySpec(
    # The key in `registry.FAMILIES`.
    name="example",
    # Prefix of `_class_name` in a base's model_index.json. The longest match among all families counts.
    pipeline="ExampleDiffusion",
    # The class in model.py. It is imported when a base is loaded.
    loader="lorakit.families._template.model:ExampleDiffusion",
    # One entry for each text encoder. T5 has kind="T5", trainable=False; see families/sd3/spec.py.
    text_encoders=(TextEncoder("text_encoder"),),
    versions=(EXAMPLE,),
    # The denoiser's folder in the base, and its class in diffusers.
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    # None: the scheduler's configuration has the prediction type. families/sd3/spec.py sets it here.
    prediction=None,
    # The next three depend on the architecture. A transformer needs its own; see families/sd3/spec.py.
    # `adapter.target_modules` -> regular expression of layer names.
    target_patterns=unet.TARGET_PATTERNS,
    # How often each layer is applied, for the estimates of memory and time.
    layer_uses=unet.layer_uses,
    # The sides of training pictures must be multiples of this.
    bucket_multiple=unet.bucket_multiple,
)
