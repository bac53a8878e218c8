"""The photos: folder, captions, buckets, augmentation, checks, and latents.

May import: core, config.
Used by: inference, runs, training, ui, cli.

Modules: folder, entries, masks (find) · decode (read) · captions (text) · caption_edits (write them, and undo that) ·
buckets (size) · augment (flip and jitter) · checks (what is wrong with these photos) · duplicates · time_limit ·
holdout · dataset (rows and batches) · latents. The last two import torch, no other does.
Of the user's folder only captions are written, by caption_edits; all else is only read.
"""
