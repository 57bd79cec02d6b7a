"""How long quantizing will take by the clock: products, passes over memory, operators called and weights rounded, each at a
speed that a small piece of the same work is measured to have on this machine as it is now."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from thresher.graph.nodes import value

from ...structure.experts import ExpertSite
from ..config import RSQConfig
from . import codes as rsq_codes
from . import rounding
from .bits import PROBE_ROWS, PROBE_TOKENS
from .gptq import gptq, round_to_nearest
from .hessian import Factor
from .pieces import Site
from .sizes import Sizes, count
from .steps import Step

aten = torch.ops.aten
READS = ("aten.linear.default", "aten.bmm.default", "thresher.expert_linear.default")

_PASS_RATE = 3e9  # bytes a second of elementwise work
_READ_RATE = 3e8  # bytes a second of weights that are hashed, looked through and proved
_TURN = 1000  # operations for each weight that is rotated, at the speed of large products
_FACTOR = 2  # and for each of the K x K x K of a Hessian that is factored and inverted
_MEASURED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PROOF_ROWS = 64  # tokens that the rotation is proved on, by both programs in fp64
_A_NODE = 12  # operators' worth of Python for a node that the sweep calls
_A_STEP = 2000  # and for a group of linears: its statistics, factor, codes and report
_COLUMNS, _FEW, _MANY = 128, 16, 2048  # of the weights that rounding is timed on
_MOMENT = 0.1  # seconds for each of these measurements
_HINDERED = 5  # times the fastest run that a run takes where other work has the cores


def seconds(sizes: Sizes, steps: Sequence[Step], config: RSQConfig, model: int, runs: int) -> float:
    """By the clock. model: bytes of the weights. runs: how many programs the batches pass through."""
    rate_of = functools.cache(_rate)  # measured once a dtype for an estimate
    single, double, call = rate_of(torch.float32), rate_of(torch.float64), _call()
    a_column, a_weight = _rounding(config)
    total = model / _READ_RATE
    for step in steps:
        k = step.group[0].in_features
        weights = sum(matrices(s) * s.in_features * s.out_features for s in step.group)
        for node in step.nodes:
            dtype = value(node).dtype if isinstance(value(node), torch.Tensor) else None
            rate = rate_of(dtype) if dtype in _MEASURED else single
            for at, many in sizes.shapes:
                once = _products(node, at) / rate + sizes.bytes(node, at) / _PASS_RATE + _A_NODE * call
                total += runs * many * once
            total += 2 * _A_NODE * call  # for the proof
        total += (3 * runs - 2) * sizes.tokens * k * k / single
        total += matrices(step.group[0]) * _FACTOR * k**3 / double + weights * k / single
        total += _A_STEP * matrices(step.group[0]) * call
        total += a_column * _columns(step) + a_weight * weights
        total += (3 * _TURN + 4 * _PROOF_ROWS) * weights / double  # rotated for proof, batches and rounding
    return total + (_probing(steps, a_weight, single) if config.average_bits else 0.0)


def _probing(steps: Sequence[Step], a_weight: float, single: float) -> float:
    """Looking for each layer's bits: every layer is rounded once, and all layers behind it run on a short batch."""
    weights = sum(matrices(s) * s.in_features * s.out_features for step in steps for s in step.group)
    layers = len({step.piece.name for step in steps})
    return weights * (a_weight + layers / 2 * (2 * PROBE_ROWS * PROBE_TOKENS + _TURN) / single)


def matrices(site: Site) -> int:
    """How many matrices a site is: each expert of a mixture has one."""
    return site.count if isinstance(site, ExpertSite) else 1


def _columns(step: Step) -> int:
    """Columns that are rounded one after another, each for as many rows as are rounded together."""
    first = step.group[0]
    k, rows = first.in_features, sum(s.out_features for s in step.group)
    return matrices(first) * k * -(-rows // rounding.rows_at_once(k))


def _products(node: fx.Node, at: Mapping[str, int]) -> float:
    """Floating-point operations of a linear or an attention."""
    if str(node.target) in READS:
        return 2.0 * count(value(node).shape, at) * int(value(node.args[0]).shape[-1])
    if node.target is aten.scaled_dot_product_attention.default:
        keys = value(node.args[1]).shape
        return 4.0 * count(value(node.args[0]).shape, at) * count(keys[-2:-1], at)
    return 0.0


def _rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of a few hundred rows."""
    a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    return 2 * 256 * 512 * 512 / _typical(lambda: torch.mm(a, b), 8)


def _call() -> float:
    """Seconds that an operator takes on next to nothing."""
    one = torch.ones(1)
    return _typical(lambda: [one.add(one) for _ in range(200)], 3) / 200


def _rounding(config: RSQConfig) -> tuple[float, float]:
    """Seconds for a column, however short, and for each weight in it, by the grid and the method that will be used."""
    grid = rsq_codes.make_grid(config, config.bits)
    make = torch.Generator().manual_seed(0)
    order = torch.arange(_COLUMNS) if config.activation_order else None
    factored = Factor(torch.eye(_COLUMNS), order, torch.zeros(_COLUMNS, dtype=torch.bool), 0.0, 0)
    taken = []
    for rows in (_FEW, _MANY):
        weight = torch.randn(rows, _COLUMNS, generator=make)
        if config.method == "nearest":
            taken.append(_typical(functools.partial(round_to_nearest, weight, grid), 2))
        else:
            taken.append(_typical(functools.partial(gptq, weight, factored, grid), 2))
    a_weight = max(0.0, taken[1] - taken[0]) / ((_MANY - _FEW) * _COLUMNS)
    return max(0.0, taken[0] / _COLUMNS - _FEW * a_weight), a_weight


def hindered() -> bool:
    """Whether threads wait for each other: most runs of a small product take many times what the fastest does."""
    if torch.get_num_threads() == 1:
        return False
    a, b = torch.ones(256, 512), torch.ones(512, 512)
    taken = _taken(lambda: torch.mm(a, b), 16)
    return sum(taken) / len(taken) > _HINDERED * min(taken)


def _typical(run: Callable[[], object], times: int) -> float:
    """Mean seconds of some runs. Not the fastest: where other work has the cores, threads wait for each other in nearly
    every operator, and quantizing meets that all the way."""
    taken = _taken(run, times)
    return sum(taken) / len(taken)


def _taken(run: Callable[[], object], times: int) -> list[float]:
    """Seconds of so many runs behind a first one, or of as many as a moment has room for."""
    taken: list[float] = []
    until = time.perf_counter() + _MOMENT
    while len(taken) <= times and (len(taken) < 2 or time.perf_counter() < until):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken[1:]
