"""NVFP4: quantization to 4.5 bits a value, and linears over it."""

from . import linear, plain, quantize

__all__ = ["linear", "plain", "quantize"]
