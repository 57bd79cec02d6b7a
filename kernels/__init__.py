"""Operators of the `thresher::` namespace: one reference each, beside its providers."""
