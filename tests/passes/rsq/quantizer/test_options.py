"""Options of a quantization, how widths are shared out, and weights that are none."""

import captures
import pytest
import torch

import thresher.backend  # noqa: F401 (defines the operators)
from thresher.errors import ArgumentError, ThresherError
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.plan import make_plan
from thresher.passes.rsq.quantizer import bits as rsq_bits
from thresher.passes.structure.recover import recover


def test_bits_go_where_they_matter():
    sizes = dict.fromkeys("abc", 100)
    assert rsq_bits.allocate({"a": 1.0, "b": 0.1, "c": 0.001}, sizes, 3.0) == {"a": 4, "b": 3, "c": 2}
    assert rsq_bits.allocate(dict.fromkeys("abc", 1.0), sizes, 2.0) == dict.fromkeys("abc", 2)


@pytest.mark.parametrize("options", [dict(bits=5), dict(group_size=16), dict(importance="attn"), dict(r_min=0),
                                     dict(average_bits=9.0), dict(keep="head"), dict(damping=0)])  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(ArgumentError, match="rsq option"):
        RSQConfig(**options).validate()


def test_a_mask_of_minus_infinity_is_no_broken_weight():
    from thresher.passes.rsq.quantizer.checks import check_weights

    class Masked(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.proj = torch.nn.Linear(8, 8)
            self.register_buffer("mask", torch.full((4, 4), value).triu(1))

        def forward(self, x):
            return torch.softmax(self.proj(x) @ x.transpose(-1, -2) + self.mask, -1)

    for value, fine in ((float("-inf"), True), (float("inf"), False), (float("nan"), False)):
        model = Masked(0.0)
        model.mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), value)
        program = captures.capture.from_export(torch.export.export(model, (torch.randn(2, 4, 8),)))
        if fine:
            check_weights(program, {})
        else:
            with pytest.raises(ThresherError, match="mask has 6 NaN or infinite"):
                check_weights(program, {})


@pytest.mark.parametrize("options", [dict(head_bits=5), dict(head_bits=8, grid="nvfp4")])
def test_widths_of_a_head_are_checked(options):
    with pytest.raises(ArgumentError, match="rsq option head_bits"):
        RSQConfig(**options).validate()


def test_a_product_by_a_matrix_stored_the_other_way_is_quantized_unrotated(tmp_path):
    """Nothing rotates a weight [in, out] outside the layers, and with rotation switched off nothing rotates any."""
    import thresher

    class Bare(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(8, width))

        def forward(self, x):
            return x @ self.up

    torch.manual_seed(0)
    for width in (8, 24):  # a square one fits either way, and only its values tell
        model, x = Bare(width).eval(), torch.randn(4, 6, 8)
        plain = thresher.RSQ(bits=8, group_size=-1, rotate=False, rotate_heads=False, rotate_down=False,
                             rotate_inputs=False)  # fmt: skip
        low = thresher.quantize(model, [{"x": x}], plain)
        low.save(tmp_path / f"{width}.safetensors")
        with torch.no_grad():
            got = thresher.compile(model, {"x": x}, target="reference", **low.options)(x=x)
            want = model(x)
        assert [r.site for r in low.report.linears] == ["up"]
        assert (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("way", ["dynamo", "export"])
def test_a_cache_is_seen_where_no_layer_is_recovered_too(monkeypatch, way):
    program = captures.of_zoo("llama", way)
    structure = recover(program)
    cached = [e.cached for e in make_plan(program, structure, RSQConfig()).edits.values() if e.heads_out]
    monkeypatch.setattr(type(structure), "layer_of", lambda *_: None)
    alone = [e.cached for e in make_plan(program, structure, RSQConfig()).edits.values() if e.heads_out]
    assert alone == cached == [way == "dynamo"] * 2
