"""pytest, with the C++ kernels built under address and undefined-behaviour checks.

    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \\
        THRESHER_CACHE_DIR=/tmp/sanitized python tests/support/sanitized.py tests/lowering/steps

A report ends the process. The cache folder must be one of its own.
"""

import sys

import pytest
from bad_calls import SANITIZE

from thresher.kernels import native

if __name__ == "__main__":
    native._FLAGS = (*native._FLAGS, *SANITIZE)
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
