"""Op `thresher::sparse_mlp`: a gated MLP's up and down projections for active neurons only.

    sparse_mlp(gate [..., F], x [..., K], up_weight [F, K], up_scale? [F], up_bias? [F], up_act,
               weight [F, D], scale?, bias? [D], threshold?, tau, bmax, site) -> [..., D]

    out = (gate * up_act(x @ up_weight.T + up_bias), where gate is kept, else 0) @ weight + bias

`gate` is the *activated* gate: its projection stays a dense linear of the graph, which decides who
is active, and may be quantized or merged by others. Where it is off, neither the neuron's row of
the up weight nor that of the down weight is read. Both weights are neuron-major; for the up
projection that is how nn.Linear keeps it.

up_act      "identity" (ReGLU and its like) or "relu" (dReLU: neurons that the second ReLU switches
            off are dropped before the down projection as well)
The rest is as in `sparse_down`. One difference from the dense formula is meant: where the gate is
zero and the up projection overflows, `0 * inf` would be NaN, and is 0 here.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from thresher import ops
from thresher.errors import ArgumentError, unknown_key
from thresher.graph.nodes import argument
from thresher.plain_form import Plain
from thresher.pricing import Prices

from . import down

UP_ACTS = ("identity", "relu")


def check(
    gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site
) -> None:
    """Raise ArgumentError unless the arguments of one call fit each other. Reads metadata only."""
    down.check_dispatch("gate", gate, tau)
    neurons = gate.shape[-1]
    if up_act not in UP_ACTS:
        raise unknown_key("up_act", up_act, UP_ACTS)
    down.check_weight("up_weight", up_weight, up_scale, gate.dtype, neurons)
    if (
        x.dim() != gate.dim()
        or x.shape[:-1] != gate.shape[:-1]
        or x.dtype != gate.dtype
        or up_weight.shape[-1] != x.shape[-1]
    ):
        raise ArgumentError(
            "x",
            f"{x.dtype} {tuple(x.shape)}",
            f"{gate.dtype} {(*gate.shape[:-1], up_weight.shape[-1])}, what the gate was computed from",
            "Pass the MLP's input, with as many tokens as the gate.",
        )
    if up_scale is not None and up_scale.dim() != 1:
        raise ArgumentError(
            "up_scale", f"shape {tuple(up_scale.shape)}", "[F]", "Use one scale for each neuron."
        )
    down.check_weight("weight", weight, scale, gate.dtype, neurons)
    if torch.uint8 in (weight.dtype, up_weight.dtype):
        raise ArgumentError(
            "weight", "4-bit codes", "fp or int8 weights",
            "Use sparse_down for a 4-bit down projection: an up projection's rows have no outputs to group along.",
        )  # fmt: skip
    if weight.dtype != up_weight.dtype:
        raise ArgumentError(
            "weight", weight.dtype, f"{up_weight.dtype}, like up_weight", "Quantize both weights, or neither."
        )
    down.check_threshold(threshold, neurons)
    down.check_bias(up_bias, neurons, gate.dtype, "up_bias")
    down.check_bias(bias, weight.shape[1], gate.dtype)


def hidden(gate, x, up_weight, up_scale, up_bias, up_act, threshold) -> torch.Tensor:
    """What the down projection reads, [..., F]: computed densely, zero where the gate is not kept."""
    u = F.linear(x, down.dequantized(up_weight, up_scale, x.dtype), up_bias)
    u = u.relu() if up_act == "relu" else u
    g = down.kept(gate, threshold)
    return torch.where(g == 0, torch.zeros_like(g), g * u)


def _fake(gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site):
    return gate.new_empty((*gate.shape[:-1], weight.shape[1]))


def _inputs(device, dtype):
    g = torch.Generator().manual_seed(1)

    def sample(label, lead, width, neurons, features, density, *, up_act="identity", int8=False, bias=False,
               threshold=None, tau=1.0, bmax=16):  # fmt: skip
        def weight(rows, cols):
            if int8:
                return down.quantized(rows, cols, 1, device, g)
            return (torch.randn(rows, cols, generator=g) / cols**0.5).to(device, dtype), None

        def vector(size):
            return torch.randn(size, generator=g).to(device, dtype) if bias else None

        gate = down.activations(lead, neurons, density, device, dtype, g).abs()
        x = torch.randn(*lead, width, generator=g).to(device, dtype)
        limit = None if threshold is None else torch.tensor(threshold, device=device)
        args = (gate, x, *weight(neurons, width), vector(neurons), up_act, *weight(neurons, features))
        return ops.Sample(label, (*args, vector(features), limit, tau, bmax, ""))

    return [
        sample("one token", (1, 1), 128, 384, 128, 0.1),
        sample("nothing active", (2,), 64, 96, 32, 0.0, bias=True),
        sample("odd sizes, bias", (3,), 45, 77, 39, 0.5, bias=True),
        sample("dReLU, union of 5", (5,), 64, 200, 72, 0.3, up_act="relu", bias=True),
        sample("threshold", (2, 4), 64, 200, 80, 0.8, threshold=0.5),
        sample("above bmax", (17,), 64, 128, 64, 0.1, up_act="relu"),
        sample("int8", (3,), 64, 128, 96, 0.3, int8=True, bias=True),
        sample("no token", (0,), 32, 64, 32, 0.5),
    ]


def _price(model: Prices, node: fx.Node) -> float:
    return down.price(model, node, sum(model.numel(argument(node, n)) for n in ("up_weight", "weight")))


@ops.define(
    "sparse_mlp(Tensor gate, Tensor x, Tensor up_weight, Tensor? up_scale, Tensor? up_bias, str up_act, "
    "Tensor weight, Tensor? scale, Tensor? bias, Tensor? threshold, float tau, int bmax, str site) -> Tensor",
    fake=_fake,
    inputs=_inputs,
    # As for `sparse_down`; half types round the up projection and the product as well.
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
    providers=("cpu_cpp", "triton"),
    price=_price,
    plain=Plain(loss=down.DENSE),
    check=check,
)
def sparse_mlp(
    gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site
):
    """A gated MLP [..., D] behind its gate: `act(gate) * up(x)`, then the down projection, inactive neurons left out.

    gate: [..., F], activated. x: [..., K], the input of the up projection. up_weight: [F, K], with `up_scale` where it
    is codes; up_act: "identity" or "relu". The rest as in `sparse_down`.
    """
    h = hidden(gate, x, up_weight, up_scale, up_bias, up_act, threshold)
    return F.linear(h, down.dequantized(weight, scale, gate.dtype).t(), bias)
