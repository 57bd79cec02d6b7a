"""Padded batches to packed rows and back."""
