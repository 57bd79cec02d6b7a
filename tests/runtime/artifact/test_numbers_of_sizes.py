"""A number that the model computes from a size: a file is right for every size it takes, and refuses the others."""

import pytest
import torch

import thresher
from thresher.errors import ArgumentError, CaptureError
from thresher.graph import capture
from thresher.runtime.artifact import signature

RIGHT = {
    "n squared": lambda x: x.shape[1] ** 2,
    "2 to the n": lambda x: 2 ** x.shape[1] % 7,
    "n mod 3": lambda x: x.shape[1] % 3,
    "at most 7": lambda x: min(x.shape[1], 7),
}
FIXED = {
    "root of n": lambda x: x.shape[1] ** 0.5,
    "one in n": lambda x: 1 / x.shape[1],
    "n as a float": lambda x: float(x.shape[1]),
    "rows to minus one": lambda x: x.shape[0] ** -1,
    "rows in n": lambda x: x.shape[0] / x.shape[1],
}


class Scaled(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.number = torch.nn.Linear(8, 8), number

    def forward(self, x):
        return self.linear(x) * self.number(x)


@pytest.mark.parametrize("name", [*RIGHT, *FIXED])
def test_a_file_is_right_or_refuses_the_sizes(name, tmp_path):
    torch._dynamo.reset()
    model, example = Scaled({**RIGHT, **FIXED}[name]).eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        fast = thresher.compile(model, (example,), "none", target="reference", dynamic=True)
        thresher.save(fast, tmp_path / "m", example_inputs=(example,))
        loaded, refused = thresher.load(tmp_path / "m", target="reference"), 0
        for sizes in ((3, 5, 8), (2, 9, 8), (4, 4, 8)):
            x = torch.randn(sizes)
            torch.testing.assert_close(fast(x), model(x))
            try:
                torch.testing.assert_close(loaded(x)["output"], model(x))
            except ArgumentError as reason:
                assert "accepted is sizes with Eq(" in str(reason)
                refused += 1
    assert refused == (2 if name in FIXED else 0)


@pytest.mark.parametrize("name", ["root of n", "one in n", "rows in n"])
def test_an_exported_program_does_not_keep_the_examples_number(name):
    model, example = Scaled(FIXED[name]).eval(), torch.randn(3, 5, 8)
    sizes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("s")}}
    exported = torch.export.export(model, (example,), dynamic_shapes=sizes, strict=False)
    with pytest.raises(CaptureError, match="computed from a size"):
        capture.from_export(exported)
    capture.from_export(torch.export.export(model, (example,), strict=False))


@pytest.mark.parametrize("text", ["Eq(f, 5)", "Eq(s0, f)", "f < 3"])
def test_a_file_that_relates_sizes_it_does_not_have_is_refused(text):
    manifest = {"inputs": [], "outputs": [], "relations": [text]}
    symbols = {"s0": {"hint": 3, "min": 2, "max": None}}
    with pytest.raises(
        ValueError, match="'f' is not arithmetic on s0"
    ):  # which whoever reads the file names it with
        signature.check_described(manifest, symbols, None)
