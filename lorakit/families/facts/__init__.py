"""Facts of a base that its configurations, metadata and names tell, and of what is no base."""
