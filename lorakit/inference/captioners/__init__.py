"""Models that describe a photo in words: one file for each kind."""
