"""Models that describe a photo in words: one module for each kind."""
