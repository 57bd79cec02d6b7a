"""Every architecture in the zoo is recovered whole, from both captures, and what is recovered is true.

What a site says (which rows make which head, what a norm's scale is, what crosses a layer's ends) is
checked by computing with it: the same numbers must come out as the graph computes.
"""

from pathlib import Path

import captures
import pytest
import torch
import written_tables
import zoo
from sampled import sampled
from torch import fx

from thresher.graph.nodes import value
from thresher.passes.extract import extract
from thresher.passes.structure.recover import recover

aten = torch.ops.aten

WHOLE = [n for n in zoo.ZOO if n not in ("mpt", "llava", "qwen2_vl")]
NO_PLACE = {"bert": ["pooler.dense"], "roberta": ["pooler.dense"], "vit": ["pooler.dense"]}
DYNAMIC = ["llama", "gemma3", "gpt2", "gpt_neox", "bert", "modernbert"]
CASES = [(n, "export") for n in WHOLE]
CASES += [("bert", "dynamo"), ("gpt2", "dynamo"), ("llama", "dynamo-dynamic"), ("llama", "export-dynamic")]
FURTHER = [(n, "dynamo") for n in WHOLE] + [
    (n, f"{w}-dynamic") for w in ("dynamo", "export") for n in DYNAMIC
]
CASES += [pytest.param(*case, marks=pytest.mark.thorough) for case in FURTHER if case not in CASES]
SAME_NAME = {"gelu_new": "gelu_tanh"}
PAGE = Path(__file__).resolve().parents[3] / "docs" / "structure.md"
BEGIN, END = "<!-- table: written by tests/passes/structure/test_recover.py -->", "<!-- end of table -->"
SHOWN = [n for n in zoo.ZOO if n not in ("llava", "qwen2_vl")]  # these two are several graphs


def roles(structure):
    return [site.role for site in structure.linears]


def expected_roles(entry):
    attention = ["qkv", "o"] if entry.fused_qkv else ["q", "k", "v", "o"]
    fused_gate = entry.name in ("phi3", "modernbert")
    mlp = ["gate_up", "down"] if fused_gate else ["gate", "up", "down"] if entry.gated else ["up", "down"]
    return sorted((attention + mlp) * 2)


@pytest.mark.parametrize(("name", "way"), CASES, ids=str)
def test_an_architecture_is_recovered_whole(name, way):
    entry, structure = zoo.ZOO[name], recover(captures.of_zoo(name, way))
    assert [m.site for m in structure.missed] == NO_PLACE.get(name, [])
    assert len(structure.attentions) == entry.attention and len(structure.mlps) == entry.mlp
    assert len(structure.layers) == 2 and all(layer.complete for layer in structure.layers)
    assert {n.kind for n in structure.norms} == {entry.norm}
    outside = [r for r in roles(structure) if r in ("head", "")]
    assert sorted(r for r in roles(structure) if r not in ("head", "")) == expected_roles(entry)
    assert outside == (["head"] if structure.head else [""] * len(NO_PLACE.get(name, [])))
    assert (structure.head is not None) == (entry.causal)
    for site, window in zip(structure.attentions, entry.windows, strict=True):
        assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (4, entry.kv_heads, 8, 8)
        assert site.fused == entry.fused_qkv and not site.cross and site.past is None
        assert (site.rope is not None) == (entry.positions == "rope")
        assert (site.softcap is not None) == entry.softcap
        assert site.scale == pytest.approx(1.0 if name == "t5_encoder" else 8**-0.5)
        if entry.positions in ("alibi", "bias"):
            assert site.visibility.kind == "generic"
        elif entry.causal:
            assert site.is_causal and site.window == (window and window - 1)
        else:
            assert site.visibility.kind == "bidirectional" and site.window == (window and window // 2)
    for site in structure.mlps:
        assert site.width == (128 if name == "bloom" else 48)
        assert (site.gate is not None) == entry.gated
        assert site.activation == SAME_NAME.get(entry.activation, entry.activation)
    kinds = [e.kind for e in structure.embeddings]
    assert ("position" in kinds) == (entry.positions in ("learned", "counted"))
    assert ("token" in kinds) == (entry.inputs is zoo.tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sampled(["llama", "gemma3", "gpt2", "bert", "modernbert", "t5_encoder"], WHOLE)
)
def test_both_captures_and_stripped_names_give_the_same(name):
    programs = [captures.of_zoo(name, "dynamo"), captures.of_zoo(name, "export")]
    programs.append(programs[0].copy())
    for node in programs[-1].graph.nodes:
        node.meta.pop("nn_module_stack", None)
    first, *others = [recover(p) for p in programs]
    for other in others:
        assert other.summary() == first.summary()
        for kind in ("attentions", "mlps", "layers", "norms"):
            assert [s.fqn for s in getattr(other, kind)] == [s.fqn for s in getattr(first, kind)]
        assert [s.weight_fqn for s in other.linears] == [s.weight_fqn for s in first.linears]


@pytest.mark.parametrize("name", WHOLE)
def test_layers_are_named_as_in_the_model(name):
    model, _ = zoo.ZOO[name].build()
    modules = dict(model.named_modules())
    structure = recover(captures.of_zoo(name))
    for index, layer in enumerate(structure.layers):
        assert layer.fqn in modules and layer.fqn.split(".")[-1] == str(index) and layer.index == index
        for linear in (*layer.attention.linears, *layer.mlp.linears):
            assert linear.fqn in modules and linear.fqn.startswith(layer.fqn + ".")
            assert structure.layer_of(linear) is layer


class Values(fx.Interpreter):
    """Runs a Program and keeps every value."""

    def __init__(self, program, inputs):
        super().__init__(program.graph_module)
        self.of = {}
        with torch.no_grad():
            self.run(*inputs)

    def run_node(self, n):
        self.of[n] = super().run_node(n)
        return self.of[n]


@pytest.fixture(params=WHOLE)
def computed(request):
    program = captures.of_zoo(request.param)
    _, inputs = zoo.ZOO[request.param].build()
    return program, recover(program), Values(program, captures.arguments(program, inputs)).of


def tensor(program, name):
    return program.weights[name].tensor.detach()


def applied(program, values, linear, rows=None):
    """The linear's result on the value it reads, or the features `rows` of it."""
    weight = tensor(program, linear.weight)
    weight = weight.T if linear.transposed else weight
    assert weight.shape == (linear.out_features, linear.in_features)
    bias = tensor(program, linear.bias) if linear.bias else None
    result = torch.nn.functional.linear(values[linear.x], weight, bias)
    return result if rows is None else result[..., rows]


def test_linears_compute_what_they_say(computed):
    program, structure, values = computed
    for linear in structure.linears:
        torch.testing.assert_close(applied(program, values, linear), values[linear.output])


def test_norms_compute_what_they_say(computed):
    program, structure, values = computed
    for norm in structure.norms:
        x = values[norm.input]
        centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        y = y * (norm.offset + tensor(program, norm.weight))
        y = y + tensor(program, norm.bias) if norm.bias else y
        torch.testing.assert_close(y, values[norm.output], atol=1e-4, rtol=1e-4)


def test_projections_take_the_rows_they_say(computed):
    """[batch, heads, tokens, dim] from the linear's features, wherever nothing but views lies between."""
    program, structure, values = computed
    for site in structure.attentions:
        plain = {"v": site.v}
        if site.rope is None and site.q_norm is None:
            plain |= {"q": site.q, "k": site.k}
        for role, operand in plain.items():
            result = values[operand.result]
            own = applied(program, values, operand.linear, operand.rows).movedim(-2, 1)
            factor = (
                8**-0.5 if role == "q" and "decoder.layers" in site.fqn else 1.0
            )  # OPT scales its queries
            torch.testing.assert_close(result.reshape(own.shape), own * factor)
            everything = torch.arange(operand.linear.out_features)
            assert operand.whole == torch.equal(operand.rows.flatten(), everything)


def test_queries_keys_and_values_share_a_fused_linear_without_overlap(computed):
    _, structure, _ = computed
    for site in structure.attentions:
        if site.fused:
            rows = torch.cat([p.rows.flatten() for p in (site.q, site.k, site.v)])
            assert sorted(rows.tolist()) == list(range(site.q.linear.out_features))


ACTIVATIONS = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def test_mlps_compute_what_they_say(computed):
    program, structure, values = computed
    for site in structure.mlps:
        act = ACTIVATIONS[site.activation]
        up = applied(program, values, site.up.linear, site.up.rows)
        hidden = (
            act(up)
            if site.gate is None
            else up * act(applied(program, values, site.gate.linear, site.gate.rows))
        )
        torch.testing.assert_close(hidden, values[site.hidden], atol=1e-5, rtol=1e-5)
        assert values[site.output] is not None and site.down.role == "down"


def test_a_layer_is_closed_by_its_inputs(computed):
    program, structure, values = computed
    for before, layer in zip([None, *structure.layers], structure.layers):
        assert layer.inputs[0] is layer.input and (before is None or before.output is layer.input)
        assert values[layer.input].shape == values[layer.output].shape
        alone = extract(program, layer.inputs, [layer.output])
        result = alone.run(*(values[n] for n in layer.inputs))[0]
        torch.testing.assert_close(result, values[layer.output])
        tensors = [n for n in layer.inputs if isinstance(value(n), torch.Tensor)]
        mask_and_tables = len(layer.attention.masks) + (2 if layer.attention.rope else 0)
        assert len(tensors) == 1 + mask_and_tables


def test_the_stream_is_what_the_branches_add(computed):
    _, structure, values = computed
    for layer in structure.layers:
        for branch in layer.branches:
            assert branch.add in layer.nodes and branch.adds[-1] is branch.add
            result = branch.post_norm.output if branch.post_norm else branch.site.output
            others = [b.site.output for b in layer.branches if b is not branch] if layer.parallel else []
            total = values[branch.stream] + sum(values[n] for n in (result, *others))
            torch.testing.assert_close(total.reshape(values[branch.add].shape), values[branch.add])


def test_embeddings_are_what_the_first_layer_reads(computed):
    program, structure, values = computed
    (tower,) = structure.towers
    kinds = [e.kind for e in tower.embeddings]
    if set(kinds) & {"patch", "prefix"}:
        return  # concatenated, not added
    total = 0
    for site in tower.embeddings:
        scale = tensor(program, site.scale) if isinstance(site.scale, str) else site.scale or 1.0
        total = total + values[site.node] * scale
    if tower.embedding_norm is not None:
        assert torch.allclose(
            total.expand_as(values[tower.embedding_norm.input]), values[tower.embedding_norm.input]
        )
    else:
        torch.testing.assert_close(total, values[structure.layers[0].input])


def test_keys_and_values_for_a_cache_are_exports():
    structure = recover(captures.of_zoo("llama", "dynamo"))
    for layer in structure.layers:
        assert layer.attention.v.result in layer.exports and len(layer.exports) == 2


def test_a_recovery_that_fails_says_where_and_why():
    structure = recover(captures.of_zoo("mpt"))
    reasons = {m.site: m.reason for m in structure.missed}
    assert "masked_fill" in reasons["transformer.blocks.0.attn"]
    assert "No attention was recovered" in reasons["transformer.blocks.1"]
    assert all(m.reason.endswith(".") for m in structure.missed)
    assert len(structure.mlps) == 2 and not any(layer.complete for layer in structure.layers)


def table() -> str:
    rows, missed = [], []
    for name in SHOWN:
        structure = recover(captures.of_zoo(name))
        model = type(zoo.ZOO[name].build()[0]).__name__
        rows.append(
            {"model": f"{model}" + (f" ({name})" if name == "llama_reglu" else ""), **structure.summary()}
        )
        missed += [f"- {model}, `{m.site}`: {m.reason}" for m in structure.missed]
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(str(row[h]) for h in heads) + " |" for row in rows]
    return "\n".join([*lines, "", "What was not recovered, and why:", "", *missed])


def test_the_page_is_up_to_date():
    """THRESHER_UPDATE_DOCS=1 writes the table in docs/structure.md anew."""
    written_tables.is_up_to_date(PAGE, BEGIN, END, table(), "tests/passes/structure/test_recover.py")
