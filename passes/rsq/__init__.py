"""RSQ: rotated low-bit weights. The pass is here; what finds the codes is in `quantizer`, which it never imports."""

from .rsq import RSQ

__all__ = ["RSQ"]
