"""Op `thresher::sparse_down`: the down projection of an MLP, reading only active neurons' weights.

    sparse_down(act [..., F], weight [F, D], scale?, bias? [D], threshold?, tau, bmax, site) -> [..., D]

`weight` is neuron-major: row i is what neuron i adds to the output, so a neuron that is off costs
no memory traffic. The dense fallback reads the same copy. A neuron is *kept* for a token iff
`!(|a| <= threshold)`; so written, a NaN is kept and reaches the output. Without a threshold exactly
the zeros are dropped, which changes no result. Tokens of one call share the union of what they keep.

weight      act's dtype; or with `scale`, fp32 [F] or [F, groups] with the groups along D, so that
            dropping a neuron drops its scales too: int8, or uint8 [F, D / 2] of 4-bit codes less 8,
            two a byte, the first in the low half
threshold   None (zero), or fp32 [] or [F]; never negative
tau         largest union density, 0 to 1, at which the sparse kernel runs; negative: measured on the
            machine that runs the call (`sparse_tune`), so a saved program carries no machine's number
bmax        largest number of tokens for which the union is looked for
site        a name under which `thresher.site_counts` counts this call; "" counts nothing

Dispatch never changes the meaning: entries that are not kept count as zero in the dense kernel too.
It can change rounding, since a dense matrix product adds in another order.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from thresher import ops, site_counts
from thresher.errors import ArgumentError
from thresher.graph.nodes import argument, value
from thresher.plain_form import Plain
from thresher.pricing import Prices, dtype_of

# bf16 and fp16: the reference's own output rounding is 2^-9 and 2^-12, plus one for its inputs' order.
# fp32: sums of up to 512 terms in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def kept(act: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
    """`act` with zeros where a neuron is not kept; NaN is kept. Same shape and dtype."""
    if threshold is None:
        return act
    return torch.where(act.float().abs() <= threshold, torch.zeros_like(act), act)


def features_of(weight: torch.Tensor) -> int:
    """D, the number of outputs of a neuron-major weight in any format."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def dequantized(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight in `dtype`: `code[i, d] * scale[i, d // (D / groups)]`, the product taken in fp32."""
    if scale is None:
        return weight.to(dtype)
    codes = weight
    if weight.dtype == torch.uint8:
        codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1).to(torch.int8) - 8
    rows, cols = codes.shape
    groups = scale.numel() // max(rows, 1)
    wide = codes.float().reshape(rows, groups, cols // groups) * scale.reshape(rows, groups, 1)
    return wide.reshape(rows, cols).to(dtype)


def check_weight(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype, neurons: int
) -> None:
    """Raise ArgumentError unless a neuron-major weight fits the activations and its scales fit it."""
    if weight.dim() != 2 or weight.shape[0] != neurons:
        raise ArgumentError(
            name,
            f"shape {tuple(weight.shape)}",
            f"[{neurons}, features], one row a neuron",
            "Pass the weight neuron-major: the transpose of a down projection's nn.Linear weight.",
        )
    quantized = (torch.int8, torch.uint8)
    if (scale is None and weight.dtype != dtype) or (scale is not None and weight.dtype not in quantized):
        raise ArgumentError(
            name,
            f"{weight.dtype} {'without' if scale is None else 'with'} a scale, for {dtype} activations",
            f"{dtype}, or torch.int8 with a scale, or torch.uint8 (4-bit codes) with a scale",
            "Convert the weight, or pass the scale it was quantized with.",
        )
    if scale is not None:
        rows, cols = weight.shape[0], features_of(weight)
        groups = scale.shape[-1] if scale.dim() == 2 else 1
        uneven = groups == 0 or cols % groups or (weight.dtype == torch.uint8 and cols // groups % 2)
        if scale.dtype != torch.float32 or scale.dim() not in (1, 2) or scale.shape[0] != rows or uneven:
            raise ArgumentError(
                f"{name}'s scale",
                f"{scale.dtype} {tuple(scale.shape)} for a weight of {(rows, cols)}",
                "fp32 [F] or [F, groups], with the groups dividing the columns, evenly sized for 4-bit codes",
                "Quantize each neuron's row by itself, in equal groups along the row.",
            )


def check_threshold(threshold: torch.Tensor | None, neurons: int) -> None:
    """Raise ArgumentError unless the threshold is fp32, one number or one for each neuron."""
    if threshold is not None and (
        threshold.dtype != torch.float32 or tuple(threshold.shape) not in ((), (neurons,))
    ):
        raise ArgumentError(
            "threshold",
            f"{threshold.dtype} {tuple(threshold.shape)}",
            f"None, or fp32 of shape [] or [{neurons}]",
            "Give one threshold, or one for each neuron.",
        )


def check_bias(bias: torch.Tensor | None, features: int, dtype: torch.dtype, name: str = "bias") -> None:
    """Raise ArgumentError unless the bias is None or [features] of the activations' dtype."""
    if bias is not None and (tuple(bias.shape) != (features,) or bias.dtype != dtype):
        raise ArgumentError(
            name,
            f"{bias.dtype} {tuple(bias.shape)}",
            f"{dtype} of shape [{features}]",
            "Convert the bias to the activations' dtype; one number for each output feature.",
        )


def check_dispatch(name: str, act: torch.Tensor, tau: float) -> None:
    """Raise ArgumentError unless activations can be dispatched at a union density of `tau`."""
    if act.dim() < 1 or not act.is_floating_point():
        raise ArgumentError(
            name, f"{act.dtype} {tuple(act.shape)}", "floating [..., neurons]", "Convert it first."
        )
    if not tau <= 1.0:  # a NaN too
        raise ArgumentError("tau", tau, "a share up to 1, or below 0 to measure", "Give the largest density.")


def check(act, weight, scale, bias, threshold, tau, bmax, site) -> None:
    """Raise ArgumentError unless the arguments of one call fit each other. Reads metadata only."""
    check_dispatch("act", act, tau)
    check_weight("weight", weight, scale, act.dtype, act.shape[-1])
    check_threshold(threshold, act.shape[-1])
    check_bias(bias, features_of(weight), act.dtype)


def _fake(act, weight, scale, bias, threshold, tau, bmax, site):
    return act.new_empty((*act.shape[:-1], features_of(weight)))


def activations(lead, neurons, density, device, dtype, generator):
    """Random activations, zero with probability 1 - density; shape [*lead, neurons]."""
    act = torch.randn(*lead, neurons, generator=generator)
    act = act * (torch.rand(*lead, neurons, generator=generator) < density)
    return act.to(device=device, dtype=dtype)


def quantized(rows, cols, groups, device, generator, bits=8):
    """A random int8 weight [rows, cols], or 4-bit codes, and its scales [rows, groups] ([rows] for one group)."""
    if bits == 4:
        weight = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
    else:
        weight = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, groups, generator=generator) / 64 + 1e-3
    return weight.to(device), (scale[:, 0] if groups == 1 else scale).contiguous().to(device)


def _inputs(device, dtype):
    g = torch.Generator().manual_seed(0)

    def sample(
        label,
        lead,
        neurons,
        features,
        density,
        *,
        groups=0,
        bits=8,
        bias=False,
        threshold=None,
        tau=1.0,
        bmax=16,
    ):
        act = activations(lead, neurons, density, device, dtype, g)
        scale = None
        if groups:
            weight, scale = quantized(neurons, features, groups, device, g, bits)
        else:
            weight = torch.randn(neurons, features, generator=g).to(device, dtype)
        b = torch.randn(features, generator=g).to(device, dtype) if bias else None
        if threshold == "each":
            threshold = torch.rand(neurons, generator=g).to(device)
        elif threshold is not None:
            threshold = torch.tensor(threshold, device=device)
        return ops.Sample(label, (act, weight, scale, b, threshold, tau, bmax, ""))

    # No NaN: opcheck compares results with ==. NaN and inf have tests of their own.
    return [
        sample("one token", (1,), 512, 256, 0.1),
        sample("nothing active", (2, 1), 64, 32, 0.0, bias=True),
        sample("all active, odd sizes, bias", (3, 1), 77, 45, 1.0, bias=True),
        sample("batch 16, one threshold", (4, 4), 200, 80, 0.6, threshold=0.5),
        sample("threshold for each neuron", (5,), 200, 80, 0.9, threshold="each"),
        sample("above tau", (2,), 128, 64, 0.9, threshold=0.1, tau=0.3),
        sample("int8, union of 7", (7,), 256, 136, 0.1, groups=1, bias=True),
        sample("int8 in groups", (1,), 130, 96, 0.3, groups=3),
        sample("int8 above bmax", (17,), 64, 48, 0.3, groups=2),
        sample("int4 in groups", (1,), 130, 96, 0.3, groups=3, bits=4, bias=True),
        sample("int4, odd groups of tokens", (6,), 96, 74, 0.3, groups=1, bits=4),
        sample("int4 above tau", (4,), 96, 128, 0.9, groups=2, bits=4, tau=0.1),
        sample("no token", (0,), 64, 32, 0.5),
    ]


DENSE = "It computes densely: no exported operator skips neurons. The result is the same, the saving is not there."


def price(model: Prices, node: fx.Node, weights: float) -> float:
    """A product that reads the active neurons' share of `weights` numbers; dense where there are too many tokens.

    The share is that of the calls counted at this site so far, and all of them where nothing was counted.
    """
    act = node.args[0]
    rows = model.numel(act) / model.size(value(act).shape[-1])
    known = site_counts.site(str(argument(node, "site", ""))).union_density
    share = 1.0 if known is None or rows > argument(node, "bmax") else known
    return model.linear(rows, weights * max(min(share + 0.02, 1.0), 1e-3), dtype_of(node))


@ops.define(
    "sparse_down(Tensor act, Tensor weight, Tensor? scale, Tensor? bias, Tensor? threshold, "
    "float tau, int bmax, str site) -> Tensor",
    fake=_fake,
    inputs=_inputs,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "triton"),
    price=lambda model, node: price(model, node, model.numel(argument(node, "weight"))),
    plain=Plain(loss=DENSE),
    check=check,
)
def sparse_down(act, weight, scale, bias, threshold, tau, bmax, site):
    """The down projection [..., D] of activations `act` [..., F]: neurons below their threshold count as zero.

    weight: [F, D], row i being what neuron i alone needs, in `act`'s dtype or as codes with `scale`. bias: [D] or None.
    threshold: fp32 [F], or None for exact zeros. tau, bmax, site: when and under which name a call is computed
    sparsely; they do not change what is computed.
    """
    return F.linear(kept(act, threshold), dequantized(weight, scale, act.dtype).t(), bias)
