"""The photos: folder, captions, buckets, augmentation, checks, and latents.

May import: core, config.
Used by: inference, runs, training, ui, cli.

Modules: folder, entries, masks (find) · decode (read) · captions (text) · buckets (size) · augment (flip and jitter) ·
checks (what is wrong with these photos) · duplicates · time_limit · holdout · dataset (rows and batches) · latents. The
last two import torch, no other does.
This room only reads the user's folder; the front end saves captions there that somebody edits in it.
"""
