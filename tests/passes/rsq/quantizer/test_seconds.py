"""The time that quantizing is said to take: near what it takes, also where a model is small or its grid is slow."""

import functools
import time
import types

import captures
import pytest
import torch

import thresher.backend  # noqa: F401 (defines the operators)
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer import seconds
from thresher.passes.rsq.quantizer.driver import Driver
from thresher.passes.rsq.quantizer.pieces import Batch

GRIDS = [RSQConfig(bits=3), RSQConfig(bits=4, group_size=32, activation_order=True), RSQConfig(grid="nvfp4")]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, by CPU time: other workers have the cores at times."""
    monkeypatch.setattr(seconds, "time", types.SimpleNamespace(perf_counter=time.process_time))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def program():
    return captures.of_zoo("llama", "dynamo-dynamic")


def driver(program, config, rows=8):
    tokens = torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens[:4])
    batches = [Batch({"input_ids": t, "attention_mask": mask}, None, t) for t in tokens.split(4)]
    return Driver(program, batches, config)


@pytest.mark.parametrize("config", GRIDS, ids=["rows", "groups", "nvfp4"])
def test_a_small_model_takes_what_was_said_within_a_factor(program, config):
    """Nearly all of it is Python and columns of few rows: counted by products alone, a tenth of it was said."""
    driver(program, config, rows=4).run()  # what a process does once, at its first, is not said
    run = driver(program, config)
    said, start = run.estimate().seconds, time.process_time()
    run.run()
    assert 0.3 < said / (time.process_time() - start) < 3


def test_time_follows_tokens_and_method(program, monkeypatch):
    # measured once: what is compared is not how busy the machine was at each estimate
    for measured in ("_rate", "_call"):
        monkeypatch.setattr(seconds, measured, functools.cache(getattr(seconds, measured)))

    def of(rows=8, **options):
        return driver(program, RSQConfig(**options), rows).estimate().seconds

    rounded, more = of(bits=3), of(200, bits=3)
    assert of(bits=3, method="nearest") < rounded < of(grid="nvfp4")
    assert 1.5 * rounded < more < of(200, bits=3, follow_original=0.5)


def test_threads_that_wait_for_each_other_are_said(program, monkeypatch):
    run = driver(program, RSQConfig(bits=3))
    assert not run.estimate().hindered  # one thread waits for none
    torch.set_num_threads(2)
    for slow, waits in ((0.001, False), (0.05, True)):
        monkeypatch.setattr(seconds, "_taken", lambda run, times, slow=slow: [0.001] + [slow] * times)
        assert seconds.hindered() == waits
    assert "OMP_NUM_THREADS=1" in str(run.estimate())
