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
    with_paths_removed,
)
from lorakit.config.option import Option
from lorakit.config.schema import (
    ADAPTER_SECTIONS,
    LENGTHS,
    OFFLOAD_NEEDS_CUDA,
    SECTIONS,
    AdapterConfig,
    Config,
    DataConfig,
    DoraConfig,
    LayersConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    PissaConfig,
    RsLoraConfig,
    SampleConfig,
    TrainConfig,
    options,
    section_type,
)
from lorakit.core.errors import ConfigError

__all__ = [
    "ADAPTER_SECTIONS",
    "DEFAULT_PRESET",
    "LENGTHS",
    "OFFLOAD_NEEDS_CUDA",
    "SECTIONS",
    "AdapterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DoraConfig",
    "LayersConfig",
    "LohaConfig",
    "LokrConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Option",
    "OutputConfig",
    "PissaConfig",
    "RsLoraConfig",
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
    "with_paths_removed",
]
