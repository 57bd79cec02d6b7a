"""A compiled model in one file: written, read, checked."""
