"""The command line.

May import: core, config, data, engine, adapters, families, formats, inference, runs, training.
Used by: the user.
"""
