"""The options: their types, limits and defaults, read strictly from TOML and overrides.

May import: core.
Used by: data, engine, adapters, families, formats, inference, runs, training, cli, ui.
"""

from lorakit.config.loading import (
    DEFAULT_PRESET,
    as_tables,
    from_tables,
    load,
    parse_override,
    preset_folder,
    preset_names,
    to_toml,
    toml_value,
    with_absolute_paths,
    without_paths,
)
from lorakit.config.option import Option, unquote
from lorakit.config.schema import (
    ADAPTER_SECTIONS,
    DEVICE_MISSING,
    LENGTHS,
    OFFLOAD_NEEDS_CUDA,
    SECTIONS,
    XFORMERS_MISSING,
    AdapterConfig,
    Config,
    DataConfig,
    DropoutConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
    options,
    section_type,
)
from lorakit.core.errors import ConfigError

__all__ = [
    "ADAPTER_SECTIONS",
    "DEFAULT_PRESET",
    "DEVICE_MISSING",
    "LENGTHS",
    "OFFLOAD_NEEDS_CUDA",
    "SECTIONS",
    "XFORMERS_MISSING",
    "AdapterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DropoutConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Option",
    "OutputConfig",
    "SampleConfig",
    "TrainConfig",
    "as_tables",
    "from_tables",
    "load",
    "options",
    "parse_override",
    "preset_folder",
    "preset_names",
    "section_type",
    "to_toml",
    "toml_value",
    "unquote",
    "with_absolute_paths",
    "without_paths",
]
