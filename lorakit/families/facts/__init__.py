"""Facts of a base from its configurations, metadata and names, and recognition of files that are not bases."""
