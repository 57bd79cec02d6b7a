"""Keeps the checkout's root off sys.path: transformers would import our `kernels/` as its own package."""

import gc
import logging
import os
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and threads that wait for each other's core spin: small loops took a hundred times longer.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test proves what it compiles, and not what an earlier run did.
os.environ.setdefault("THRESHER_REWRITE_CACHE", "0")
os.environ.setdefault(
    "THRESHER_WAIT", "1"
)  # what a test calls is compiled then, and not while the next one runs


def pytest_collection_finish():
    """What the imports made stays: the collector, which tracing calls often, need not look at it again."""
    gc.collect()
    gc.freeze()
    # tracing makes millions of objects that live on: with 700, the default, a tenth of the time went into looking at them
    gc.set_threshold(100_000, 20, 100)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """What a file leaves behind, such as captured programs, stays as well: a tenth of the time went into looking at it."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="also the cases of matrices that a plain run leaves out"
    )


def pytest_collection_modifyitems(config, items):
    import torch

    from thresher.machine import linear_rates

    linear_rates.enabled = False  # what a recipe leaves alone must not hang on how fast this machine is
    # sizes and symbols of tiny models seldom repeat, so that noting results costs more than it saves
    torch._dynamo.config.fake_tensor_cache_enabled = False
    # once for each compiled frame, for a log: it empties the processor's caches first, which takes 40 ms
    if hasattr(torch._dynamo.guards, "profile_guard_manager"):
        torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0
    # pytest hands its handlers to every logger that stands alone, this one too, and each step of a trace is then written
    # out for it; this one it does not know
    if hasattr(torch._logging._internal, "trace_log"):
        torch._logging._internal.trace_log = logging.Logger("torch.__trace")
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none on this machine")
    for item in items:
        if item.get_closest_marker(
            "gpu"
        ):  # not a keyword: a folder's name is one too, and tests/gpu has tests without
            item.add_marker(skip)
