"""Pictures from a base and an adapter.

May import: core, config, data, engine, adapters, families, formats.
Used by: training, cli.
"""
