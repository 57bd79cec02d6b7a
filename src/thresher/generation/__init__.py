"""`generate` of transformers, whose steps call the model: here they call the compiled one."""

from .last_call import LastCall
from .run import generate

__all__ = ["LastCall", "generate"]
