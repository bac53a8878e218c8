"""Facts of an adapter file that `inspect` reports."""
