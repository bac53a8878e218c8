"""The training run: inputs, loss, optimizer step, validation, checkpoints and self-check.

May import: core, config, data, engine, adapters, families, formats, inference, runs.
Used by: cli.
"""
