"""Merge, extract, resize and combine finished adapters."""
