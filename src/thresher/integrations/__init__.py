"""Thresher where models are used by way of another library."""
