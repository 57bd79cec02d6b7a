"""A Python that has TensorRT-RTX, for tests that build engines without a GPU.

This one where tensorrt-rtx can be imported, the one that THRESHER_RTX_PYTHON names, or a virtual environment under the
cache directory into which pip fetches it once (200 MB). Elsewhere such tests skip and say why.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thresher.lowering.tensorrt import engine

PIN = ["tensorrt-rtx==1.7.1.116", "numpy"]


@functools.cache
def python():
    """(the path of such a Python, None), or (None, the reason why there is none)."""
    reason = engine.unavailable()
    if reason is None:
        return engine.builder(), None
    cache = Path(os.environ.get("THRESHER_CACHE_DIR", Path.home() / ".cache" / "thresher"))
    root = cache / "tensorrt-rtx-1.7.1.116"
    found, done = root / "bin" / "python", root / "installed"
    if not done.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", str(root)], check=True, capture_output=True)
            pip = [str(found), "-m", "pip", "install", "-q"]
            subprocess.run([*pip, "setuptools", "wheel"], check=True, capture_output=True, timeout=300)
            subprocess.run([*pip, "--no-build-isolation", *PIN], check=True, capture_output=True, timeout=600)
            done.touch()
        except (OSError, subprocess.SubprocessError) as error:
            detail = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()[-1:]
            return None, f"{reason} Fetching it failed: {error} {detail}"
    return str(found), None


def use(patch: pytest.MonkeyPatch) -> None:
    """Let engines be built by that Python, or skip."""
    found, reason = python()
    if found is None:
        pytest.skip(reason)
    patch.setenv(engine.PYTHON, found)
