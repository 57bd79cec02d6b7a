"""NVFP4: linears with 4-bit weights in blocks of sixteen."""

from .nvfp4 import NVFP4, NVFP4Config

__all__ = ["NVFP4", "NVFP4Config"]
