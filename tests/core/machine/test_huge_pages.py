"""Weights that steps read are moved onto huge pages where they lie, where the system allows it."""

import os
import subprocess
import sys

import pytest
import torch

from thresher.machine import huge_pages


def asked_of(monkeypatch, answer=lambda *_: 0):
    """What the system was asked for, in calls of (address, bytes, advice)."""
    asked = []
    monkeypatch.setattr(huge_pages, "_call", lambda: lambda *a: asked.append(a) or answer(*a))
    monkeypatch.setattr(huge_pages, "_asked", set())
    return asked


def test_every_page_that_a_weight_touches_is_asked_for_once(monkeypatch):
    asked = asked_of(monkeypatch)
    weights = [torch.zeros(huge_pages.LEAST // 8, dtype=torch.bfloat16) for _ in range(6)]
    thread = huge_pages.move(weights)
    thread.join()
    pages = {a // huge_pages.SIZE for a, _, _ in asked}
    assert len(asked) == len(pages) and {size for _, size, _ in asked} == {huge_pages.SIZE}
    for weight in weights:
        first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes - 1
        assert set(range(first // huge_pages.SIZE, last // huge_pages.SIZE + 1)) <= pages
    assert huge_pages.move(weights) is None  # they are there


def test_few_weights_and_those_of_a_device_are_left_alone(monkeypatch):
    asked = asked_of(monkeypatch)
    assert huge_pages.move([torch.zeros(1024)]) is None
    assert huge_pages.move([torch.empty(huge_pages.LEAST, device="meta")]) is None
    assert not asked


def test_the_environment_says_no():
    script = "from thresher.machine import huge_pages; print(huge_pages._call())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env={**os.environ, "THRESHER_HUGE_PAGES": "0"})  # fmt: skip
    assert done.stdout.strip() == "None"


@pytest.mark.skipif(huge_pages._call() is None, reason="this system moves nothing onto huge pages")
def test_values_and_places_stay():
    weight = torch.arange(huge_pages.LEAST, dtype=torch.int32)
    place = weight.data_ptr()
    first = -(-place // huge_pages.SIZE) * huge_pages.SIZE
    failed = huge_pages._call()(first, huge_pages.SIZE, 25)
    thread = huge_pages.move([weight])
    thread.join()
    assert weight.data_ptr() == place
    assert torch.equal(weight, torch.arange(weight.numel(), dtype=torch.int32))
    if failed == 0:  # Linux 6.1 and newer
        assert _huge(place) >= huge_pages.SIZE


def _huge(place: int) -> int:
    """Bytes on huge pages of the mapping that holds an address."""
    here = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split(" ")[0]
            if "-" in first and ":" not in first:
                start, end = (int(n, 16) for n in first.split("-"))
                here = start <= place < end
            elif here and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    return 0
