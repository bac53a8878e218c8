"""The photos: folder, captions, buckets, augmentation, checks, and latents.

May import: core, config.
Used by: inference, runs, training, ui, cli.

Files: photo_folder, entries, masks, concepts find them. decode reads them. caption_files and captions read the texts.
caption_edits writes captions, and undoes that. buckets has the sizes, augment flips and jitters. checks, duplicates and
time_limit examine the photos. holdout, dataset and latents make rows and batches. Only dataset and latents import
torch. lorakit writes only captions into the user's folder, by caption_edits.
"""
