"""Many mixed requests through compiled models: right each time, in the same memory and as many programs."""

import random
import threading

import pytest
import soak


@pytest.fixture
def served():
    return soak.pairs()


@pytest.mark.slow
@pytest.mark.parametrize("calls", [150, pytest.param(20_000, marks=pytest.mark.thorough)])
def test_soak(served, calls):
    found = soak.run(served, calls, warm=max(200, calls // 10))
    assert not found.wrong, found.wrong[:5]
    assert found.calls >= calls and found.edits > 4
    assert max(found.programs) <= 6  # rows of one, columns of one, without padding: some kinds, and no more
    assert found.grown_bytes < 32 << 20 if calls < 20_000 else found.growth <= 0.01, found.growth


@pytest.mark.thorough
def test_soak_on_inductor():
    found = soak.run(soak.pairs("inductor"), 2000)
    assert not found.wrong and max(found.programs) <= 6 and found.growth <= 0.01


def test_no_count_is_lost_between_threads(served):
    pair, failures = served[0], []
    for seed in range(4):
        pair.off(soak.request(random.Random(seed), 90))
    before = sum(c.calls for c in pair.fast.counters)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(10):
                assert pair.off(soak.request(draw, 90)) <= pair.tolerance
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(100 + n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]
    assert sum(c.calls for c in pair.fast.counters) == before + 60
