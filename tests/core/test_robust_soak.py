"""Many mixed requests through one compiled model: no growth of memory or compilations; threads get their own answers.

THRESHER_SOAK_SECONDS=3600 python -m pytest tests/core/test_robust_soak.py      # the hour-long run
"""

import gc
import os
import random
import threading
import time

import psutil
import pytest
import torch
import zoo

import thresher

SECONDS = float(os.environ.get("THRESHER_SOAK_SECONDS", "15"))


def request(rng: random.Random, vocabulary: int) -> dict[str, torch.Tensor]:
    rows, width = rng.randint(1, 5), rng.randint(2, 24)
    lengths = torch.tensor([rng.randint(1, width) for _ in range(rows)])
    lengths[0] = width
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    ids = torch.randint(
        3, vocabulary, (rows, width), generator=torch.Generator().manual_seed(rng.randint(0, 1 << 30))
    )
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def served():
    torch._dynamo.reset()
    model, inputs = zoo.ZOO["bert"].build()
    return model, thresher.compile(model, inputs, "exact", target="reference", dynamic=True)


def same(model, fast, asked) -> None:
    real = asked["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**asked).last_hidden_state[real]
    torch.testing.assert_close(fast(**asked).last_hidden_state[real], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_soak(served):
    model, fast = served
    rng, process = random.Random(0), psutil.Process()
    for _ in range(40):  # every kind of shape: one row, one column, no padding
        same(model, fast, request(rng, 90))
    gc.collect()
    memory, sessions = process.memory_info().rss, len(fast.sessions)
    lowered = sum(s.counters.lowered for s in fast.sessions)
    end, calls = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        same(model, fast, request(rng, 90))
        calls += 1
    gc.collect()
    assert calls > 20 and len(fast.sessions) == sessions
    assert (
        sum(s.counters.lowered for s in fast.sessions) <= lowered + 2
    )  # a kind of batch may come late, not often
    grown = process.memory_info().rss - memory
    assert grown < 32 << 20, f"{grown >> 20} MiB more after {calls} calls"


def test_threads_get_their_own_answers(served):
    model, fast = served
    for seed in range(8):
        same(model, fast, request(random.Random(seed), 90))
    failures: list[BaseException] = []
    before = sum(c.calls for c in fast.counters)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(10):
                same(model, fast, request(rng, 90))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(100 + n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]
    assert sum(c.calls for c in fast.counters) == before + 60  # no count was lost between threads
