"""Errors, names, units, random seeds, files: what every room stands on.

May import: nothing.
Used by: config, data, engine, adapters, families, formats, inference, runs, training, cli, ui.
"""
