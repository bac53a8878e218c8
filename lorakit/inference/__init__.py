"""Pictures from a base and an adapter."""
