"""The front end in the browser: it reads and writes the run folder and starts processes.

May import: core, config, data, engine, adapters, families, formats, inference, runs, training.
Used by: the user.
"""
