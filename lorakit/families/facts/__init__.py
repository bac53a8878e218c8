"""Facts of a base that its configurations, metadata and names tell."""
