"""Calls of all sizes are laid out alike, so that they can share programs."""

import torch

from thresher.generation.programs import alike


def test_a_slice_is_laid_out_as_if_made_anew():
    wide = torch.arange(12).reshape(2, 6)
    for tensor in (wide[:, -1:], wide[:1], wide.t()):
        made = alike(tensor)
        assert torch.equal(made, tensor) and made.stride() == torch.empty(tensor.shape).stride()
    assert alike(wide) is not wide[:] and alike(torch.ones(2, 3)).is_contiguous()
