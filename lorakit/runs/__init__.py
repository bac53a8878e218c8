"""A run without torch: preflight, plan, memory estimate, folder, queue and report.

May import: core, config, data, engine, adapters, families, formats.
Used by: training, cli, ui.
"""
