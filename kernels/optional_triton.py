"""Whether Triton is at hand. Every module of Triton kernels imports without it, and then defines none."""

from __future__ import annotations

MISSING: str | None = None
"""Why there are no Triton kernels, or None."""

try:
    import triton  # noqa: F401
except ImportError:
    MISSING = "Triton is not installed; install it with: pip install 'thresher[gpu]'"
