"""Operators of the `thresher::` namespace.

An operator *is* its reference: a function in plain PyTorch, readable and slow. Everything else about it
stands beside that reference: schema, fake, an input generator, a tolerance, and what others look up
instead of knowing the operator by name (its price, how tokens go through it, its form in plain operators,
how its speed is measured). Every faster implementation is a provider that must agree with it. Calling
`torch.ops.thresher.NAME` picks, per call, the first provider that this machine supports and that accepts
these arguments; which one ran, and why a faster one did not, can be read back from the operator.

    @define("scale_rows(Tensor x, Tensor s) -> Tensor", fake=lambda x, s: torch.empty_like(x),
            inputs=_inputs, tolerance={torch.float32: 1e-6}, tokens=row_by_row, plain=Plain(), check=_check)
    def scale_rows(x, s):
        return x * s[:, None]

    @scale_rows.provider("cpu_cpp", device="cpu", supported=native.available)
    def _(x, s): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import op_signature, plain_form
from .errors import unknown_key
from .graph.token_labels import TokenRule
from .op import Op, Provider, Sample
from .plain_form import Plain
from .pricing import Price, Rate

__all__ = ["NAMESPACE", "Op", "Provider", "Sample", "all_ops", "define", "get", "of"]

NAMESPACE = "thresher"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, Op] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    inputs: Callable[[torch.device, torch.dtype], Sequence[Sample]],
    tolerance: Mapping[torch.dtype, float],
    providers: Sequence[str] = (),
    price: Price | None = None,
    tokens: TokenRule | None = None,
    plain: Plain | str = plain_form.NONE,
    rates: Sequence[Rate] = (),
    check: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Define `thresher::NAME` from its reference.

    schema: the torch schema, name included; functional (no mutation, no aliasing).
    fake: output metadata from fake inputs; must give the reference's shapes, dtypes and strides.
    inputs: `(device, dtype) -> samples`, tails and empty cases included; one generic test feeds
        them to `torch.library.opcheck` and to every provider.
    tolerance: largest relative L2 error of a provider against the reference in fp64 or fp32, per
        activation dtype. A dtype that is absent is not supported. Justify loosened numbers in a comment.
    providers: names of its faster implementations, the preferred first; each registers itself (`Op.provider`).
    price: seconds of a call for the cost model (`pricing`); without one its operands' bytes and a call.
    tokens: where the batch and the sequence are in its result (`graph.token_labels`); without one no pass follows
        tokens through it.
    plain: its form in plain ATen for exporters (`plain_form`), or a full sentence on why there is none.
    rates: how `thresher doctor --calibrate` measures its speed, by the classes that `price` asks for.
    check: takes a call's arguments and raises ArgumentError unless they belong together. It runs before every
        provider and before the reference, so none of them need ask again: a kernel reads raw memory, and a
        graph that was loaded may hold anything. Metadata is free to read; of tensors on a CPU it also reads
        what is used as an index (`arguments.in_range`). What it lets through, the reference must compute.

    Raises ArgumentError where a function does not fit the schema.
    """

    def register(reference: Callable[..., Any]) -> Op:
        name = schema.split("(", 1)[0].strip()
        _check(schema, name, reference, fake, plain, check)
        op = Op(
            name, schema, reference, fake, inputs, tolerance,
            tuple(providers), price, tokens, plain, rates, check,
        )  # fmt: skip
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, op.dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        op.overload.direct = op.direct  # type: ignore[attr-defined]
        _OPS[name] = op
        return op

    return register


def _check(
    schema: str, name: str, reference: Callable[..., Any], fake: Callable[..., Any], plain: Plain | str,
    check: Callable[..., Any] | None,
) -> None:  # fmt: skip
    """Raise ArgumentError unless the functions of a definition take its schema's arguments."""
    parsed = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
    op_signature.check(f"reference of thresher::{name}", reference, parsed)
    op_signature.check_count(f"fake of thresher::{name}", fake, parsed)
    if isinstance(plain, Plain) and plain.run is not None:
        op_signature.check(f"plain of thresher::{name}", plain.run, parsed)
    if check is not None:
        op_signature.check_count(f"check of thresher::{name}", check, parsed)


def of(target: Any) -> Op | None:
    """The operator that a node's target calls; None for others, those of no definition here among them."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return None
    return _OPS.get(target._schema.name.partition("::")[2])


def get(name: str) -> Op:
    """The operator of that name."""
    if name not in _OPS:
        raise unknown_key("op", name, _OPS)
    return _OPS[name]


def all_ops() -> list[Op]:
    """Every operator defined so far, by name."""
    return [_OPS[name] for name in sorted(_OPS)]
