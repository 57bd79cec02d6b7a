"""How much a block changes each token: `thresher::token_transition` and what TransPrune makes of it.

TransPrune (arXiv 2507.20630, section 3) ranks image tokens by how attention and the MLP move them:
the size of the update against its input, and its direction. Each operator that combines scores has
two arithmetics, which give different rankings:

    mode               paper                         official_code
    direction          softmax of 1 - |cos|          softmax of 1 - cos
    softmax runs over  the sequence's image tokens   the whole tensor, text and batch included
    fusion with IGA    half of each                  each L1-normalised over the image, then added

`official_code` couples the rows of a batch; it stands here for parity with published numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from thresher.errors import ArgumentError, unknown_key
from thresher.ops import Sample, define
from thresher.plain_form import Plain

MODES = ("paper", "official_code")
_TINY = 1e-12
# fp32 sums over one hidden vector; half types are widened before anything is computed.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def check_pair(x: torch.Tensor, fx: torch.Tensor) -> None:
    """Raise ArgumentError unless x and fx are alike. Reads metadata only."""
    if x.dim() < 1 or not x.is_floating_point():
        raise ArgumentError("x", f"{x.dtype} {tuple(x.shape)}", "floating [..., d]", "Pass a block's input.")
    if x.shape != fx.shape or x.dtype != fx.dtype:
        raise ArgumentError(
            "fx",
            f"{fx.dtype} {tuple(fx.shape)}",
            f"{x.dtype} {tuple(x.shape)}, as x has",
            "Pass a block's input and its output before the residual is added.",
        )


def _pair_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)

    def one(label, *shape):
        x, fx = (torch.randn(*shape, generator=make).to(device, dtype) for _ in range(2))
        return Sample(label, (x, fx))

    samples = [one("batch", 2, 17, 64), one("odd width", 1, 5, 131), one("no tokens", 1, 0, 16)]
    x, fx = one("", 1, 6, 48).args
    x[0, 2], fx[0, 3] = 0.0, 0.0
    strided = torch.randn(3, 40, 8, generator=make).to(device, dtype).transpose(1, 2)
    return [*samples, Sample("zero vectors", (x, fx)), Sample("strided", (strided, strided * 2 + 1))]


def _fake_pair(x, fx):
    return tuple(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))


@define(
    "token_transition(Tensor x, Tensor fx) -> (Tensor, Tensor)",
    fake=_fake_pair,
    inputs=_pair_samples,
    tolerance=TOLERANCE,
    providers=("cuda_triton", "cpu_cpp"),
    plain=Plain(),
    check=check_pair,
)
def token_transition(x, fx):
    """Magnitude |fx| / |x| and cosine of (x, fx), each fp32 [...], over the last dimension of [..., d].

    A zero x gives a magnitude of |fx| / 1e-12; a zero vector on either side gives a cosine of 0.
    """
    x, fx = x.float(), fx.float()
    size, change = x.norm(dim=-1), fx.norm(dim=-1)
    cosine = (x * fx).sum(-1) / (size * change).clamp_min(_TINY)
    return change / size.clamp_min(_TINY), cosine


def _check_scores(first: str, second: str) -> Callable[..., None]:
    """The check of an operator over two scores of those names."""

    def check(a: torch.Tensor, b: torch.Tensor, image: torch.Tensor, mode: str) -> None:
        if mode not in MODES:
            raise unknown_key("mode", mode, MODES)
        for name, t in ((first, a), (second, b)):
            if t.dim() != 2 or t.shape != a.shape or not t.is_floating_point():
                accepted = "floating [batch, tokens], both alike"
                raise ArgumentError(name, f"{t.dtype} {tuple(t.shape)}", accepted, "Pass one value a token.")
        if image.shape != a.shape or image.dtype != torch.bool:
            given = f"{image.dtype} {tuple(image.shape)}"
            raise ArgumentError("image", given, f"bool {tuple(a.shape)}", "Mark the tokens of images.")

    return check


def _image_samples(device, with_modes=MODES):
    make = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 30, generator=make).to(device) for _ in range(2))
    image = torch.zeros(3, 30, dtype=torch.bool, device=device)
    image[0, 4:20] = True
    image[1, 2::3] = True  # row 2 has no image
    return [Sample(f"{mode}, a row without image", (a, b * 2 - 1, image, mode)) for mode in with_modes]


def _fake_rows(a, b, image, mode):
    return torch.empty_like(a, dtype=torch.float32, memory_format=torch.contiguous_format)


@define(
    "transition_score(Tensor magnitude, Tensor cosine, Tensor image, str mode) -> Tensor",
    fake=_fake_rows,
    inputs=lambda device, dtype: _image_samples(device),
    tolerance={torch.float32: 2e-6},
    plain=Plain(),
    check=_check_scores("magnitude", "cosine"),
)
def transition_score(magnitude, cosine, image, mode):
    """Token transition variation of one block, fp32 [B, n]: softmax(direction) * magnitude on image tokens.

    image: bool [B, n]. Tokens outside the image score 0.
    """
    magnitude, cosine = magnitude.float(), cosine.float()
    if mode == "paper":
        turn = (1 - cosine.abs()).masked_fill(~image, -torch.inf).softmax(-1)
    else:
        turn = (1 - cosine).flatten().softmax(0).view_as(cosine)
    return torch.where(image, turn * magnitude, 0.0)


@define(
    "transprune_score(Tensor transition, Tensor attention, Tensor image, str mode) -> Tensor",
    fake=_fake_rows,
    inputs=lambda device, dtype: _image_samples(device),
    tolerance={torch.float32: 2e-6},
    plain=Plain(),
    check=_check_scores("transition", "attention"),
)
def transprune_score(transition, attention, image, mode):
    """Transition variation (summed over layers) and instruction-guided attention as one score, fp32 [B, n].

    Tokens outside the image score 0.
    """
    parts = [torch.where(image, t.float(), 0.0) for t in (transition, attention)]
    if mode == "paper":
        return (parts[0] + parts[1]) / 2
    parts = [t / t.abs().sum(-1, keepdim=True).clamp_min(_TINY) for t in parts]
    return parts[0] + parts[1]
