"""The photos: found, decoded, captioned, cut to buckets, looked over, and encoded once.

Modules: folder (find) · decode (read) · captions (text) · buckets (size) · variants (flip and jitter) · check (what is
wrong with these photos) · split (hold-out) · dataset (rows and batches) · cache (latents). The last two import torch,
no other does. The user's folder is only ever read.
"""
