"""What an attention mask shows, read from its expression."""

import pytest
import torch

from thresher.graph import capture
from thresher.graph.packed_layout import Visibility
from thresher.passes.structure.masks import read_masks

LENGTH = 6


def positions():
    row = torch.arange(LENGTH)
    return row.view(1, 1, LENGTH, 1), row.view(1, 1, 1, LENGTH)


def keep(padding):
    return padding.bool()[:, None, None, :]


def causal(padding):
    q, k = positions()
    return k <= q


def window(padding):
    q, k = positions()
    return (k <= q) & (k > q - 3)


def around(padding):
    q, k = positions()
    return (q - k).abs() <= 2


def additive(mask):
    return lambda padding: torch.where(mask(padding) & keep(padding), 0.0, torch.finfo(torch.float32).min)


def packed(padding):
    segment = padding.cumsum(-1)
    return segment[:, None, :, None] == segment[:, None, None, :]


CASES = {
    "padding only": (keep, Visibility("bidirectional")),
    "causal": (causal, Visibility("causal")),
    "causal the other way round": (lambda p: positions()[0] >= positions()[1], Visibility("causal")),
    "causal and padding": (lambda p: causal(p) & keep(p), Visibility("causal")),
    "causal window": (lambda p: window(p) & keep(p), Visibility("causal", 2)),
    "window to both sides": (lambda p: keep(p) & around(p), Visibility("bidirectional", 2)),
    "additive": (additive(causal), Visibility("causal")),
    "additive window": (additive(window), Visibility("causal", 2)),
    "later keys only": (lambda p: positions()[1] >= positions()[0], Visibility("generic")),
    "window into the past and the whole future": (
        lambda p: positions()[1] > positions()[0] - 3,
        Visibility("generic"),
    ),
    "segments": (lambda p: causal(p) & packed(p), Visibility("generic")),
    "either condition": (lambda p: causal(p) | keep(p), Visibility("generic")),
    "bias": (lambda p: (positions()[1] - positions()[0]) * 0.5, Visibility("generic")),
    "weak hiding": (lambda p: torch.where(causal(p), 0.0, -1.0), Visibility("generic")),
    "hiding what is true": (lambda p: torch.where(causal(p), -1e9, 0.0), Visibility("generic")),
    "keys before a fixed one": (lambda p: positions()[1] < 4, Visibility("generic")),
    "given by the caller": (
        lambda p: p[:, None, :, None].expand(-1, -1, -1, LENGTH) > 0,
        Visibility("generic"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_is_read(name):
    make, expected = CASES[name]

    class Module(torch.nn.Module):
        def forward(self, padding):
            return make(padding)

    padding = torch.ones(2, LENGTH, dtype=torch.long)
    program = capture.from_export(torch.export.export(Module(), (padding,), strict=False))
    assert read_masks([program.outputs[0]], is_causal=False) == expected


def test_no_mask():
    assert read_masks([], is_causal=True) == Visibility("causal")
    assert read_masks([], is_causal=False) == Visibility("bidirectional")
