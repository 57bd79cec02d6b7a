"""Caches of keys and values in mixed precision, and the prefill that fills them."""
