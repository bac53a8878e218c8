"""Errors, names, units, random seeds and files, which every room uses.

May import: nothing.
Used by: config, data, engine, adapters, families, formats, inference, runs, training, cli, ui.
"""
