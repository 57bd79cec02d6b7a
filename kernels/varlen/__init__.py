"""Attention over packed rows, where each sequence sees itself only."""

from . import attention, cpu, cuda

__all__ = ["attention", "cpu", "cuda"]
