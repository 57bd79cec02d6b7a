"""Freed memory is kept where a cache grows from call to call, unless the environment says no."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from thresher import memory
torch.set_num_threads(1)
said, faults = memory.keep(), []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(1 << 20) for _ in range(16)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    del held
print(said is not None, faults[-1])
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
        assert few < 0.1 * many
