"""Transition scores: the formulas of the paper, those of the published code, and where they part."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from thresher import ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog

catalog.load()
token_transition = ops.get("token_transition")
transition_score, transprune_score = ops.get("transition_score"), ops.get("transprune_score")
IMAGE = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)


def _pair(seed=0):
    make = torch.Generator().manual_seed(seed)
    return torch.rand(2, 6, generator=make) + 0.5, torch.rand(2, 6, generator=make) * 2 - 1


def test_magnitude_and_cosine():
    x, fx = torch.randn(2, 5, 70), torch.randn(2, 5, 70)
    magnitude, cosine = token_transition(x, fx)
    torch.testing.assert_close(magnitude, fx.norm(dim=-1) / x.norm(dim=-1))
    torch.testing.assert_close(cosine, cosine_similarity(x, fx, dim=-1))


def test_large_half_values_do_not_overflow():
    x = torch.full((1, 1, 512), 60_000.0, dtype=torch.float16)
    magnitude, cosine = token_transition(x, -x)
    torch.testing.assert_close(magnitude, torch.ones(1, 1))
    torch.testing.assert_close(cosine, -torch.ones(1, 1))


def test_every_half_value_is_read_as_torch_reads_it():
    op = ops.get("token_transition")
    if op.usable(op.providers[0]) is not None:
        pytest.skip(op.usable(op.providers[0]))
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.int16).view(dtype)
        x = bits[bits.isfinite() & (bits.float().abs() < 1e18)][:, None]
        with op.force("cpu_cpp"):
            magnitude, _ = op(torch.ones_like(x), x)
        torch.testing.assert_close(magnitude, x.float().abs()[:, 0], rtol=1e-6, atol=0)


def test_paper_formula():
    magnitude, cosine = _pair()
    score = transition_score(magnitude, cosine, IMAGE, "paper")
    for row in range(2):
        on = IMAGE[row]
        turn = (1 - cosine[row, on].abs()).softmax(0)
        torch.testing.assert_close(score[row, on], turn * magnitude[row, on])
        assert score[row, ~on].eq(0).all()


def test_paper_rows_are_independent_and_published_code_is_not():
    magnitude, cosine = _pair()
    for mode, alike in (("paper", True), ("official_code", False)):
        both = transition_score(magnitude, cosine, IMAGE, mode)
        alone = transition_score(magnitude[:1], cosine[:1], IMAGE[:1], mode)
        assert torch.allclose(both[:1], alone) is alike


def test_modes_disagree_about_reversal():
    """A token turned right round changed most by 1 - cos, and not at all by 1 - |cos|."""
    magnitude, cosine = torch.ones(1, 2), torch.tensor([[-1.0, 0.0]])
    image = torch.ones(1, 2, dtype=torch.bool)
    assert transition_score(magnitude, cosine, image, "paper").argmax() == 1
    assert transition_score(magnitude, cosine, image, "official_code").argmax() == 0


def test_fusion():
    transition, attention = _pair(1)[0] * 100, _pair(2)[0]
    paper = transprune_score(transition, attention, IMAGE, "paper")
    torch.testing.assert_close(paper[IMAGE], ((transition + attention) / 2)[IMAGE])
    code = transprune_score(transition, attention, IMAGE, "official_code")
    torch.testing.assert_close(code.sum(1), torch.full((2,), 2.0))
    scaled = transprune_score(transition * 1e4, attention, IMAGE, "official_code")
    torch.testing.assert_close(scaled, code)


def test_row_without_image_scores_zero_and_finite():
    magnitude, cosine = _pair()
    nothing = torch.zeros_like(IMAGE)
    for mode in ("paper", "official_code"):
        assert transition_score(magnitude, cosine, nothing, mode).eq(0).all()
        assert transprune_score(magnitude, cosine, nothing, mode).eq(0).all()


def test_bad_calls_are_named():
    magnitude, cosine = _pair()
    with pytest.raises(ArgumentError, match="Did you mean 'paper'"):
        transition_score(magnitude, cosine, IMAGE, "papers")
    with pytest.raises(ArgumentError, match="fx"):
        token_transition(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ArgumentError, match="image"):
        transition_score(magnitude, cosine, IMAGE[:, :4], "paper")
