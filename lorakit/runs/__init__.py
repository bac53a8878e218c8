"""A run before, while and after it is trained; no torch."""
