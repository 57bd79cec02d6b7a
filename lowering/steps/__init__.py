"""Steps of a decoder run as one call of C++ that was built before, with nothing compiled for the model."""

from .program import Step, lower

__all__ = ["Step", "lower"]
