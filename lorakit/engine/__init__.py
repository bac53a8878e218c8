"""The same arithmetic in fewer operations or in less memory.

May import: core, config.
Used by: adapters, families, inference, runs, training.
"""
