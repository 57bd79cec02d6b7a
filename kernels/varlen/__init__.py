"""Attention over packed rows, where each sequence sees itself only."""

from . import attention, cpu, cuda, plain

__all__ = ["attention", "cpu", "cuda", "plain"]
