"""What the prepacking pass matches, what it declines and why, and what its program looks like."""

import masks
import pytest
import torch
import zoo
from captures import of_module, of_zoo

import thresher
from thresher import testing
from thresher.graph.packed_layout import Gather, Packing, PlanField, Scatter
from thresher.kernels import catalog
from thresher.passes.base import Context, Miss
from thresher.passes.prepack.prepack import Prepack, PrepackConfig
from thresher.passes.structure.recover import recover
from thresher.recipe import Recipe

aten = torch.ops.aten
catalog.load()


def matched(program, **options):
    """The pass's one answer on a copy of a program, and the copy."""
    program = program.copy()
    config = PrepackConfig(**options)
    context = Context(Recipe(passes=(config,)), config, lambda: recover(program))
    (site,) = Prepack().match(program, context)
    if not isinstance(site, Miss):
        Prepack().rewrite(program, site, context)
        program.clean()
    return site, program, context


class Attends(torch.nn.Module):
    """Embedding, one attention with a mask of one's choosing, a linear."""

    def __init__(self, mask):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16)
        self.mask = mask

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids).unsqueeze(1)
        seen = self.mask(attention_mask)
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)
        return self.out(x.squeeze(1))


class TestDeclines:
    def reason(self, module, **inputs):
        site, program, _ = matched(of_module(module, **inputs))
        assert isinstance(site, Miss) and site.reason.endswith("."), site
        assert program.packing is None
        return site.reason

    def test_no_mask(self):
        model, inputs = zoo.ZOO["bert"].build()
        assert "without attention_mask" in self.reason(model, input_ids=inputs["input_ids"])

    def test_a_mask_the_attention_does_not_use(self):
        class Zeroes(Attends):
            def forward(self, input_ids, attention_mask):
                return super().forward(input_ids, attention_mask) * attention_mask[..., None]

        assert "does not use the padding mask" in self.reason(Zeroes(lambda m: None), **zoo_inputs())

    def test_a_mask_that_shows_pads(self):
        seen = lambda m: (m[:, None, :, None] > 0).expand(-1, 1, -1, m.shape[1])  # noqa: E731
        assert "lets real tokens see pad tokens" in self.reason(Attends(seen), **zoo_inputs())

    def test_a_mask_of_four_dims(self):
        inputs = zoo_inputs()
        inputs["attention_mask"] = inputs["attention_mask"][:, None, None].bool()
        assert "4 dimensions" in self.reason(Attends(lambda m: m), **inputs)

    def test_a_convolution_over_positions(self):
        class Convolves(Attends):
            def __init__(self):
                super().__init__(lambda m: m[:, None, None].bool())
                self.conv = torch.nn.Conv1d(16, 16, 3, padding=1)

            def forward(self, input_ids, attention_mask):
                x = self.conv(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
                x = torch.nn.functional.scaled_dot_product_attention(
                    x[:, None], x[:, None], x[:, None], attn_mask=self.mask(attention_mask)
                )
                return self.out(x.squeeze(1))

        assert "conv1d" in self.reason(Convolves(), **zoo_inputs())

    def test_one_row(self):
        inputs = {k: v[:1] for k, v in zoo_inputs().items()}
        assert "batch dimension is 1" in self.reason(Attends(lambda m: m[:, None, None].bool()), **inputs)

    def test_rows_under_a_mask_that_is_not_causal(self):
        site, _, _ = matched(of_zoo("t5_encoder"), form="rows")
        assert 'form="rows"' in site.reason


def zoo_inputs():
    inputs = zoo.tokens()
    inputs["input_ids"] = inputs["input_ids"] % 50
    return inputs


class TestKinds:
    @pytest.mark.parametrize(
        "name, kinds",
        [
            ("llama", {("causal", -1)}),
            ("mistral", {("causal", zoo.WINDOW - 1)}),
            ("gemma2", {("causal", zoo.WINDOW - 1), ("causal", -1)}),
            ("bert", {("bidirectional", -1)}),
            ("modernbert", {("bidirectional", -1), ("bidirectional", zoo.WINDOW // 2)}),
            ("t5_encoder", {("generic", -1)}),
            ("bloom", {("generic", -1)}),
        ],
    )
    def test_masks_are_recognised_by_what_they_show(self, name, kinds):
        _, program, _ = matched(of_zoo(name))
        assert {(v.kind, v.window) for v in program.packing.visibilities.values()} == kinds

    def test_a_prefix_is_a_mask_of_its_own_kind(self):
        def prefix(mask):
            position = torch.arange(mask.shape[1])
            seen = (position[:, None] >= position) | (position < 4)
            return seen & mask[:, None, None].bool()

        program = of_module(Attends(prefix), **zoo_inputs())
        _, packed, _ = matched(program)
        (seen,) = packed.packing.visibilities.values()
        assert seen.kind == "generic" and packed.packing.masks

    def test_a_soft_cap_goes_into_the_operator(self):
        _, program, _ = matched(of_zoo("gemma2"))
        calls = [n for n in program.nodes() if "varlen_attention" in str(n.target)]
        assert [n.args[-1] for n in calls] == [50.0, 50.0]
        assert not program.nodes(aten.softmax.int)
        assert len(program.nodes(aten.tanh.default)) == 1  # the cap of the logits


class TestProgram:
    def test_the_body_holds_no_padded_size_and_no_mask(self):
        _, program, _ = matched(of_zoo("llama"))
        assert not program.nodes(aten.scaled_dot_product_attention.default)
        assert len([n for n in program.nodes() if "varlen_attention" in str(n.target)]) == 2
        for node in program.nodes():
            for size in getattr(node.meta["val"], "shape", ()):
                assert size != 12, node

    def test_inputs_are_gathered_and_results_scattered(self):
        _, program, _ = matched(of_zoo("llama"))
        layout = program.packing
        assert all(isinstance(r, Scatter) for r in layout.results)
        assert [a.name for a in layout.arguments if isinstance(a, PlanField)] == ["cu_seqlens", "max_len"]
        assert any(
            isinstance(a, Gather) and a.origin == "prologue" for a in layout.arguments
        )  # rotary tables
        assert layout.packing.causal and layout.packing.token_cost > 0

    def test_rows_take_segments_and_columns(self):
        _, program, _ = matched(of_zoo("llama"), form="rows")
        names = [a.name for a in program.packing.arguments if isinstance(a, PlanField)]
        assert names == ["segments", "columns"]
        assert len(program.nodes(aten.scaled_dot_product_attention.default)) == 2

    def test_options_reach_the_layout(self):
        _, program, _ = matched(of_zoo("bert"), buckets=5, outputs="packed", min_gain=1.5)
        packing = program.packing.packing
        assert (packing.buckets, packing.limit, packing.outputs, packing.min_gain) == (5, 36, "packed", 1.5)
        assert isinstance(packing, Packing) and not packing.causal

    def test_keys_are_not_repeated_for_query_heads(self):
        _, program, _ = matched(of_zoo("llama"))
        call = next(n for n in program.nodes() if "varlen_attention" in str(n.target))
        assert [n.meta["val"].shape[1] for n in call.args[:3]] == [4, 2, 2]


class Grouped(torch.nn.Module):
    """Two key heads for four query heads, repeated by `repeat_interleave`; or, wrongly, along the sequence."""

    def __init__(self, along=1):
        super().__init__()
        self.embed, self.along = torch.nn.Embedding(50, 16), along
        self.q, self.kv = torch.nn.Linear(16, 16), torch.nn.Linear(16, 8)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        kv = self.kv(x).unflatten(-1, (2, 4)).transpose(1, 2)
        kv = kv.repeat_interleave(2, self.along)
        if self.along == 2:
            kv = kv[:, :, ::2].repeat(1, 2, 1, 1)
        seen = attention_mask[:, None, None].bool()
        out = torch.nn.functional.scaled_dot_product_attention(q, kv, kv, attn_mask=seen)
        return out.transpose(1, 2).flatten(2)


def test_heads_repeated_one_by_one_are_shared_too():
    _, program, _ = matched(of_module(Grouped(), **zoo_inputs()))
    call = next(n for n in program.nodes() if "varlen_attention" in str(n.target))
    assert [n.meta["val"].shape[1] for n in call.args[:3]] == [4, 2, 2]


def test_tokens_repeated_one_by_one_stop_the_flow():
    site, _, _ = matched(of_module(Grouped(along=2), **zoo_inputs()))
    assert "repeats the sequence dimension" in site.reason


def test_the_mask_may_have_another_name():
    class Named(Attends):
        def forward(self, input_ids, keep):
            return super().forward(input_ids, keep)

    inputs = zoo_inputs()
    program = of_module(
        Named(lambda m: m[:, None, None].bool()), input_ids=inputs["input_ids"], keep=masks.left((5, 8, 12))
    )
    assert isinstance(matched(program)[0], Miss)
    assert not isinstance(matched(program, mask="keep")[0], Miss)


def test_the_packed_share_counts_weights_and_not_biases():
    """The head, read at one position only, stays outside, and is much smaller than the layers."""

    class Last(testing.TinyTransformer):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask)[:, -1]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = thresher.explain(Last().eval(), testing.tiny_model()[1], prepack={"min_share": 0.85})
    assert found.report["prepack"].rewritten, found.report["prepack"].missed
    assert any("selected before the LM head" in note for note in found.report.notes)


def test_a_head_that_reads_one_position_counts_by_it_however_large_it_is():
    from tiny_llama import make

    model, inputs = make(vocab_size=9000, num_hidden_layers=4), zoo_inputs()
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": masks.left((5, 8, 12)), "logits_to_keep": 1}
    found = thresher.explain(model, inputs, prepack=True)
    assert found.report["prepack"].rewritten, found.report["prepack"].missed
