"""Many calls of compiled models, of random shapes, from several threads, with weights edited between: what is counted."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import zoo

import thresher
from thresher import testing

BLOCK = 100  # calls between two edits of weights


@dataclass
class Pair:
    """A model and what was compiled from it. tolerance: relative to the largest value."""

    model: torch.nn.Module
    fast: Any
    tolerance: float
    vocabulary: int

    def off(self, asked: dict[str, torch.Tensor]) -> float:
        """How far one call is from the model at real tokens."""
        real = asked["attention_mask"].bool()
        with torch.no_grad():
            expected, got = (m(**asked) for m in (self.model, self.fast))
        if not isinstance(expected, torch.Tensor):
            expected, got = expected[0], got[0]
        expected, got = expected[real], got[real]
        return float((got - expected).abs().max() / expected.abs().max())


def pairs(target: str = "reference") -> list[Pair]:
    """A BERT that is packed, and a decoder whose weights are kept in another form: edits must reach those too."""
    torch._dynamo.reset()
    model, inputs = zoo.ZOO["bert"].build()
    tiny, shown = testing.tiny_model(width=16, layers=2)
    narrow = {"prepack": True, "bf16": {"min_weights": 0, "emulate": True}}
    return [
        Pair(model, thresher.compile(model, inputs, "exact", target=target, dynamic=True), 1e-5, 90),
        Pair(tiny, thresher.compile(tiny, shown, narrow, target=target, dynamic=True), 3e-2, 60),
    ]


def request(draw: random.Random, vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch of 1 to 5 rows of up to 24 tokens."""
    rows, width = draw.randint(1, 5), draw.randint(2, 24)
    lengths = torch.tensor([draw.randint(1, width) for _ in range(rows)])
    lengths[0] = width
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    make = torch.Generator().manual_seed(draw.randint(0, 1 << 30))
    ids = torch.randint(3, vocabulary, (rows, width), generator=make)
    return {"input_ids": ids * mask, "attention_mask": mask}


def edit(pair: Pair, draw: random.Random, factor: float) -> str:
    """Scale one matrix, in one of the ways that leave a trace; gives its name."""
    names = [n for n, p in pair.model.named_parameters() if p.dim() == 2 and "embed" not in n]
    name = draw.choice(names)
    owner, _, last = name.rpartition(".")
    weight = getattr(pair.model.get_submodule(owner), last)
    with torch.no_grad():
        match draw.choice(("in place", "data", "load")):
            case "in place":
                weight.mul_(factor)
            case "data":
                weight.data = weight.data * factor
            case "load":
                pair.model.load_state_dict({name: weight * factor}, strict=False)
    return name


@dataclass
class Counted:
    """What a run found. wrong: calls that were off or raised, in words. growth: of memory since the warm-up, a share."""

    calls: int = 0
    edits: int = 0
    wrong: list[str] = field(default_factory=list)
    growth: float = 0.0
    grown_bytes: int = 0
    programs: list[int] = field(default_factory=list)


def held() -> int:
    """Bytes of memory that the process holds, less what its allocator keeps for later.

    glibc gives each thread a pool of its own, of which it hands nothing back by itself: those fill for thousands of calls.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return psutil.Process().memory_info().rss


def run(
    given: list[Pair],
    calls: int,
    threads: int = 4,
    seed: int = 0,
    warm: int = 400,
    seconds: float = float("inf"),
    note: Callable[[Counted], None] | None = None,
) -> Counted:
    """So many calls after `warm` of them. A matrix is doubled before a block of calls and halved after it.

    seconds: after which it ends, warm-up included. note: is shown what was found after every 2,000 calls.
    """
    found, draw, begun = Counted(), random.Random(seed), time.perf_counter()

    def work(number: int, count: int) -> None:
        own = random.Random(number)
        for _ in range(count):
            pair = own.choice(given)
            asked = request(own, pair.vocabulary)
            try:
                off = pair.off(asked)
                if not off <= pair.tolerance:
                    found.wrong.append(f"{off:.2g} off at {tuple(asked['input_ids'].shape)}, seed {number}")
            except Exception as error:
                found.wrong.append(f"{type(error).__name__} at {tuple(asked['input_ids'].shape)}: {error}")

    def block(size: int) -> None:
        pair = draw.choice(given)
        where = draw.getstate()
        edit(pair, draw, 2.0)
        share = max(1, size // threads)
        every = [threading.Thread(target=work, args=(draw.randrange(1 << 30), share)) for _ in range(threads)]
        for thread in every:
            thread.start()
        for thread in every:
            thread.join()
        found.calls += share * threads
        draw.setstate(where)
        edit(pair, draw, 0.5)
        draw.random()
        found.edits += 2

    def count(before: int) -> None:
        found.grown_bytes = held() - before
        found.growth = found.grown_bytes / before
        found.programs = [sum(s.counters.lowered for s in pair.fast.sessions) for pair in given]

    while found.calls < warm:
        block(BLOCK)
    before, found.calls, shown = held(), 0, 0
    while found.calls < calls and time.perf_counter() - begun < seconds:
        block(BLOCK)
        if note is not None and found.calls // 2000 > shown:
            shown = found.calls // 2000
            count(before)
            note(found)
    count(before)
    return found
