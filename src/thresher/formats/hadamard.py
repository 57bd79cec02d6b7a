"""Hadamard matrices: which orders exist by construction, and the matrices themselves.

Sylvester gives the powers of two. Paley's first construction gives q + 1 for a prime power
q = 3 (mod 4), his second 2(q + 1) for q = 1 (mod 4). The Kronecker product of Hadamard matrices is
one, so 576 = 36 x 16, 1536 = 12 x 128 and 11008 = 344 x 32 exist. Some multiples of four (the
smallest is 92, known by other means) are not reached this way: `decompose` then gives None.
"""

from __future__ import annotations

import functools
import math

import torch

from ..errors import ArgumentError


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p ** m and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else None


def _powers(p: int, m: int, tail: list[int]) -> list[int] | None:
    """x^0, x^1, ... in GF(p)[x] modulo x^m - tail, coded in base p; None if x is not primitive."""
    q = p**m
    element = [1] + [0] * (m - 1)
    seen: list[int] = []
    while len(seen) < q - 1:
        seen.append(sum(c * p**i for i, c in enumerate(element)))
        carry = element[-1]
        element = [(c + carry * t) % p for c, t in zip([0] + element[:-1], tail)]
    return seen if len(set(seen)) == q - 1 and 0 not in seen else None


@functools.cache
def _quadratic_character(q: int) -> torch.Tensor:
    """int64 [q, q]: chi(a - b) over GF(q); 0 on the diagonal, 1 for squares, -1 for the rest."""
    p, m = _prime_power(q)  # type: ignore[misc]
    # x is primitive modulo some polynomial of degree m; its even powers are the squares.
    tails = ([t // p**i % p for i in range(m)] for t in range(1, q))
    powers = next(found for tail in tails if (found := _powers(p, m, tail)) is not None)
    chi = torch.zeros(q, dtype=torch.int64)
    chi[torch.tensor(powers)] = 1 - 2 * (torch.arange(q - 1) % 2)
    place = p ** torch.arange(m)
    digits = torch.arange(q)[:, None] // place % p
    return chi[(((digits[:, None] - digits) % p) * place).sum(-1)]


def _paley_q(order: int) -> tuple[int, int] | None:
    """(construction, q) whose Paley matrix has this order, or None."""
    if order % 4:
        return None
    for construction, q, residue in ((1, order - 1, 3), (2, order // 2 - 1, 1)):
        if q % 4 == residue and _prime_power(q) is not None:
            return construction, q
    return None


def _paley(order: int) -> torch.Tensor:
    construction, q = _paley_q(order)  # type: ignore[misc]
    core = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if construction == 1 else 1
    core[1:, 1:] = _quadratic_character(q)
    eye = torch.eye(q + 1, dtype=torch.int64)
    if construction == 1:
        return core + eye
    return torch.kron(core, torch.tensor([[1, 1], [1, -1]])) + torch.kron(
        eye, torch.tensor([[1, -1], [-1, -1]])
    )


@functools.cache
def decompose(order: int) -> tuple[tuple[int, ...], int] | None:
    """(Paley orders, power of two) whose product is `order`, with the least dense work; None if none is."""
    if order < 1:
        return None
    if order & (order - 1) == 0:
        return (), order
    options = []
    for paley in range(4, order + 1, 4):
        if order % paley or paley & (paley - 1) == 0 or _paley_q(paley) is None:
            continue
        rest = decompose(order // paley)
        if rest is not None:
            options.append(((paley, *rest[0]), rest[1]))
    return min(options, key=lambda option: math.prod(option[0]), default=None)


def check_order(argument: str, order: int) -> tuple[tuple[int, ...], int]:
    """`decompose(order)`, or ArgumentError naming the nearest block that would do."""
    found = decompose(order)
    if found is None:
        block = max(order & -order, 1)
        raise ArgumentError(
            argument,
            order,
            "an order with a Sylvester x Paley Hadamard matrix (1, 2, or such a multiple of 4)",
            f"The largest power of two that divides it is {block}: use blocks of that order.",
        )
    return found


@functools.cache
def base_matrix(order: int) -> torch.Tensor:
    """float32 [m, m] of +-1: the dense factor of `order`, the Kronecker product of its Paley matrices."""
    out = torch.ones(1, 1, dtype=torch.int64)
    for paley in check_order("order", order)[0]:
        out = torch.kron(out, _paley(paley))
    return out.float()


def sylvester(order: int) -> torch.Tensor:
    """float32 [order, order] of +-1 for a power of two."""
    out = torch.ones(1, 1)
    while out.shape[0] < order:
        out = torch.kron(out, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return out


def matrix(order: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[order, order] orthogonal: base (x) Sylvester, divided by sqrt(order). `base_matrix` comes first."""
    _, two = check_order("order", order)
    return torch.kron(base_matrix(order), sylvester(two)).to(dtype) / math.sqrt(order)
