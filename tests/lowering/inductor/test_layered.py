"""Layers that are alike are compiled once, and the pieces compute what the whole does."""

import operator

import masks
import pytest
import tiny_llama
import torch
from own_cache import own_cache
from torch import fx
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, StaticCache

import thresher
from thresher.lowering.inductor import inductor, repeats

LAYERS = repeats.LEAST + 1


@pytest.fixture
def pieces(monkeypatch):
    """The graphs that would go to Inductor, which run as they are here."""
    found = []

    def compile(module, stays, mode, config):
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        assert len(places) == len(stays)
        found.append(module)
        return module.forward

    monkeypatch.setattr(inductor, "_compile", compile)
    monkeypatch.setattr(inductor.steps, "lower", lambda graph: None)  # which would take a step as a whole
    return found


def calls():
    """Batches of other sizes than the compiled one, padded on either side and not at all."""
    for mask in (masks.right((7, 12, 3)), masks.left((5, 2)), masks.right((9, 9, 9, 9))):
        yield {"input_ids": torch.randint(1, 90, mask.shape), "attention_mask": mask}


def same(fast, model, call, tolerance=1e-4):
    real = call["attention_mask"] == 1
    with torch.no_grad():
        expected, actual = model(**call), fast(**call)
    torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        shown = real[:, -theirs.keys.shape[2] :]  # a sliding layer keeps its window
        keys = [k.transpose(1, 2)[shown] for k in (ours.keys, theirs.keys)]
        torch.testing.assert_close(*keys, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("recipe", ["exact", pytest.param({}, marks=pytest.mark.thorough)])
def test_a_decoder_is_three_pieces_at_any_size(pieces, recipe):
    model = tiny_llama.make(num_hidden_layers=LAYERS)
    fast = thresher.compile(model, next(calls()), recipe, dynamic=True)
    for call in calls():
        same(fast, model, call)
    sizes = [sum(n.op == "call_function" for n in piece.graph.nodes) for piece in pieces]
    assert len(pieces) % 3 == 0 and max(sizes) < 70, (
        sizes
    )  # a layer has about fifty nodes, all of them three hundred


def test_low_bit_weights_are_each_layers_own(pieces):
    model = tiny_llama.make(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128)
    call = next(calls())
    layered = thresher.compile(model, call, {"prepack": True, "nvfp4": True})
    whole = thresher.compile(model, call, {"prepack": True, "nvfp4": True}, target="reference")
    assert len(pieces) == 3 and layered.report["nvfp4"].rewritten == whole.report["nvfp4"].rewritten
    real = call["attention_mask"] == 1
    torch.testing.assert_close(layered(**call).logits[real], whole(**call).logits[real], rtol=1e-4, atol=1e-4)


def test_layers_of_two_kinds_in_turn_are_compiled_as_one_stretch(pieces):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2 * repeats.LEAST, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        layer_types=["sliding_attention", "full_attention"] * repeats.LEAST,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    fast = thresher.compile(model, next(calls()), "exact", dynamic=True)
    assert len(pieces) == 3
    for call in calls():
        same(fast, model, call)


def test_each_layer_writes_its_own_static_cache_in_place(pieces):
    model = tiny_llama.make(num_hidden_layers=LAYERS)
    cache, expected = (StaticCache(config=model.config, max_cache_len=24) for _ in range(2))
    ids = torch.randint(1, 90, (2, 5))
    with torch.no_grad():
        for each in (cache, expected):
            model(input_ids=ids, past_key_values=each)
    step = {"input_ids": torch.tensor([[3], [4]]), "position_ids": torch.full((2, 1), 5)}
    fast = thresher.compile(model, {**step, "past_key_values": cache}, {}, dynamic=False)
    with torch.no_grad():
        places = [layer.keys.data_ptr() for layer in cache.layers]
        for position in (6, 7):
            step["position_ids"] = torch.full((2, 1), position)
            if position == 6:
                model(**{**step, "position_ids": torch.full((2, 1), 5)}, past_key_values=expected)
            ours, theirs = (call(**step, past_key_values=c) for call, c in ((fast, cache), (model, expected)))
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
    written = [n for n in pieces[1].graph.nodes if n.target is torch.ops.aten.copy_.default]
    assert len(pieces) == 3 and len(written) >= 2, "a layer's piece writes its keys and values itself"


@pytest.mark.parametrize("cache", [pytest.param(None, marks=pytest.mark.thorough), "static"])
def test_a_prompt_is_three_pieces_and_a_step_of_free_sizes_one(pieces, cache):
    """Steps that C++ does not run: Inductor mixes up sizes that it finds to be one while it compiles a piece."""
    model = tiny_llama.make(num_hidden_layers=LAYERS)
    mask = masks.left((7, 12, 3))
    call = {"input_ids": torch.randint(1, 90, mask.shape), "attention_mask": mask}
    fast = thresher.compile(model, call, "exact", dynamic=True)
    del pieces[:]
    given = dict(**call, max_new_tokens=3, do_sample=False, pad_token_id=0, cache_implementation=cache)
    assert torch.equal(fast.generate(**given), model.generate(**given))
    assert fast.last_call.programs == 2 and len(pieces) == 4


def test_few_layers_stay_one_program(pieces):
    model = tiny_llama.make(num_hidden_layers=repeats.LEAST - 1)
    thresher.compile(model, next(calls()), "exact")
    assert len(pieces) == 1


def chain(*weights, wire=lambda x, first: x):
    """A graph of one linear and one addition for each weight; `wire` chooses what the n-th one reads."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4, device="meta")
    places = [graph.placeholder(f"w{i}") for i in range(len(weights))]
    for place, weight in zip(places, weights):
        place.meta["val"] = torch.empty(*weight, device="meta")
    first = x
    for place in places:
        y = graph.call_function(torch.ops.aten.linear.default, (wire(x, first), place))
        y.meta["val"] = torch.empty(2, 4, device="meta")
        x = graph.call_function(operator.add, (x, y))
        x.meta["val"] = torch.empty(2, 4, device="meta")
    graph.output((x,))
    return graph


def test_repeats_are_of_one_shape_and_wired_alike():
    found = repeats.find(chain(*[(4, 4)] * 7), 1)
    assert (
        [len(b) for b in found.blocks] == [2] * 7 and found.exports == [1] and not found.before + found.after
    )
    assert repeats.find(chain(*[(4, 4)] * 3), 1) is None
    assert repeats.find(chain((4, 4), (4, 4), (4, 8), (4, 4), (4, 4)), 1) is None
    # all but the first layer read two things, x and the very first input
    found = repeats.find(chain(*[(4, 4)] * 7, wire=lambda x, first: first), 1)
    assert len(found.blocks) == 6 and all(len(given) == 3 for given in found.inputs)


@pytest.mark.slow
def test_inductor_compiles_a_layer_once_and_a_call_costs_no_autograd():
    model = tiny_llama.make(num_hidden_layers=LAYERS)
    fast = thresher.compile(model, next(calls()), "exact", dynamic=True)
    for call in calls():
        same(fast, model, call)


def test_a_program_out_of_the_rewrite_cache_is_in_pieces_too(pieces, tmp_path, monkeypatch):
    """A file has the shapes of its ends only, and layers are told by those of all nodes."""
    monkeypatch.setenv("THRESHER_REWRITE_CACHE", "1")
    monkeypatch.setenv("THRESHER_CACHE_DIR", own_cache(tmp_path))
    model, call = tiny_llama.make(num_hidden_layers=LAYERS), next(calls())
    thresher.compile(model, call, "exact", dynamic=True)
    made = len(pieces)
    again = thresher.compile(model, call, "exact", dynamic=True)
    assert any("taken from the cache" in note for note in again.report.notes)
    assert made % 3 == 0 and len(pieces) == 2 * made
    places = [n for piece in pieces for n in piece.graph.nodes if n.op == "placeholder"]
    assert all(n.meta["val"] is not None for n in places)  # what Inductor is told of a piece's inputs
    same(again, model, call)


def test_inputs_reach_compiled_code_in_the_order_it_was_compiled_for():
    """Inductor's code asserts strides, and what another graph made can lie in another order, as a T5's position bias."""
    graph = fx.Graph()
    places = [graph.placeholder(name) for name in ("rows", "columns", "written", "vector")]
    for place, one in zip(places, (torch.ones(3, 4), torch.ones(4, 3).t(), torch.ones(3, 4), torch.ones(4))):
        place.meta["val"] = one
        graph.call_function(torch.ops.aten.neg.default, (place,))
    graph.call_function(torch.ops.aten.copy_.default, (places[2], places[0]))
    assert [inductor._lies_in_rows(p) for p in places] == [True, False, False, False]

    given = [torch.arange(12.0).reshape(4, 3).t(), torch.ones(4, 3).t()]
    run = inductor._in_rows(lambda *got: got, [0])
    got = run(*given)
    assert got[0].is_contiguous() and torch.equal(got[0], given[0]) and got[1] is given[1]
    assert run(got[0], given[1])[0] is got[0]
