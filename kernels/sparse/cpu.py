"""CPU providers of the sparse MLP operators: the C++ kernel for few active neurons, else a dense product.

Each call counts its active neurons and decides for itself. Where the kernel is faster even with
every neuron on (often: it streams the weight once, whatever the batch), there is nothing to decide.
"""

from __future__ import annotations

import functools
import math

import torch

from thresher import site_counts

from .. import native
from . import cpp as sparse_native
from . import down as down_defs
from . import mlp as mlp_defs
from . import tune as sparse_tune

_supported = functools.partial(native.load_error, "sparse_mlp")


def _accepts_down(act, weight, scale, bias, threshold, tau, bmax, site):
    return sparse_native.refuses(act, weight, scale, bias, threshold)


def _accepts_mlp(
    gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site
):
    return sparse_native.refuses(gate, weight, up_weight, up_scale, up_bias, scale, bias, threshold)


def _limit(tau: float, bmax: int, act: torch.Tensor, weight: torch.Tensor, width: int) -> int:
    """The largest union, in neurons, that runs sparse; -1 for none, not even an empty one."""
    neurons, features = weight.shape[0], down_defs.features_of(weight)
    tokens = math.prod(act.shape[:-1])
    if tokens > bmax:
        return -1
    if tau < 0:
        site = sparse_tune.Site(neurons, features, width, act.dtype, weight.dtype)
        tau = sparse_tune.break_even(site, tokens)
    return min(int(tau * neurons), neurons)


@down_defs.sparse_down.provider("cpu_cpp", device="cpu", supported=_supported, supports_args=_accepts_down)
def _down(act, weight, scale, bias, threshold, tau, bmax, site):
    limit = _limit(tau, bmax, act, weight, 0)
    out, active = sparse_native.down(act, weight, scale, bias, threshold, limit) if limit >= 0 else (None, -1)
    if out is None:
        out = sparse_native.matmul(down_defs.kept(act, threshold), weight, scale, bias)
    site_counts.count(site, weight.shape[0], active if active >= 0 else None)
    return out


@mlp_defs.sparse_mlp.provider("cpu_cpp", device="cpu", supported=_supported, supports_args=_accepts_mlp)
def _mlp(gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site):
    limit = _limit(tau, bmax, gate, weight, x.shape[-1])
    up = (up_weight, up_scale, up_bias, up_act)
    out, active = None, -1
    if limit >= 0:
        out, active = sparse_native.mlp(gate, x, *up, weight, scale, bias, threshold, limit)
    if out is None:
        hidden = mlp_defs.hidden(gate, x, *up, threshold)
        out = sparse_native.matmul(hidden, weight, scale, bias)
    site_counts.count(site, weight.shape[0], active if active >= 0 else None)
    return out
