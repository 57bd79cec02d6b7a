"""Freed memory is kept where a cache grows from call to call, unless the environment says no."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from thresher.machine import memory
torch.set_num_threads(1)
said, faults, cache = memory.keep(), [], []
for step in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cache = [torch.ones((1 << 20) + 4096 * step) for _ in range(16)]  # the last step's is freed behind it
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(said is not None, min(faults[-3:]))
"""


def faults(keep: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
                          env={**os.environ, "THRESHER_KEEP_MEMORY": keep})  # fmt: skip
    said, count = done.stdout.split()
    return said == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_the_next_call_asks_for_no_new_pages():
    (off, many), (on, few) = faults("0"), faults("1")
    assert not off
    if on:  # not where another C library or allocator is at work
        assert few < 0.2 * many
