"""What a session does with a call: pack it, or run it padded and say why; count; keep weights fresh."""

import threading

import leniently
import masks
import pytest
import torch
import zoo

import thresher
from thresher.errors import ArgumentError
from thresher.graph.nodes import value
from thresher.graph.packed_layout import Packing
from thresher.graph.sizes import example_of


@pytest.fixture(scope="module")
def llama():
    """Tests that use it come first: the others begin by making Dynamo forget what it has traced."""
    model, inputs = zoo.ZOO["llama"].build()
    torch._dynamo.reset()
    return model, thresher.compile(model, inputs, target="reference", dynamic=True)


def session_of(compiled):
    return max(compiled.sessions, key=lambda s: s.program.packing is not None)


def arguments(session, ids, mask):
    """A call's arguments as Dynamo passes them: the two tensors, and sizes."""
    layout = session.program.packing
    sizes = {3: ids.shape[0], 12: ids.shape[1]}  # as captured
    found = [value(p) for p in layout.padded.placeholders]
    given = [None if isinstance(v, torch.Tensor) else sizes[example_of(v)] for v in found]
    given[layout.tokens], given[layout.mask] = ids, mask
    return given


def expected_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)


class TestThreads:
    def test_calls_from_many_threads_do_not_mix(self, llama):
        model, ours = llama
        work = []
        for seed, lengths in enumerate([(5, 8, 12), (12, 1, 3), (2, 2, 12), (7, 12, 9)]):
            mask = masks.mixed(lengths)
            ids = torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(seed))
            inputs = {"input_ids": ids, "attention_mask": mask}
            work.append((inputs, expected_of(model, inputs).logits[mask.bool()]))
        ours(**work[0][0])  # nothing is left to compile
        calls, failures = sum(c.calls for c in ours.counters), []

        def run(inputs, expected):
            for _ in range(5):
                actual = ours(**inputs).logits[inputs["attention_mask"].bool()]
                if not torch.allclose(actual, expected, atol=2e-5):
                    failures.append(float((actual - expected).abs().max()))

        threads = [threading.Thread(target=run, args=w) for w in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert sum(c.calls for c in ours.counters) == calls + 20


class TestBadInput:
    def test_a_mask_that_does_not_fit_the_tokens(self, llama):
        _, ours = llama
        session = session_of(ours)
        ids, mask = torch.ones(3, 12, dtype=torch.int64), torch.ones(3, 11, dtype=torch.int64)
        with pytest.raises(ArgumentError, match="attention_mask"):
            session(arguments(session, ids, mask), {})

    @pytest.mark.parametrize("value", [2, -1, -10000, 1 << 40])
    def test_values_other_than_zero_and_one_mean_what_the_model_makes_of_them(self, llama, value):
        eager, ours = llama
        inputs = zoo.tokens(masks.right((5, 8, 12)))
        inputs["attention_mask"][0, 0] = value
        session, why = session_of(ours), "attention_mask holds values other than 0 and 1"
        before = sum(n for reason, n in session.counters.padded.items() if reason.startswith(why))
        expected = expected_of(eager, inputs)[0]
        results = session(arguments(session, inputs["input_ids"], inputs["attention_mask"]), {})
        torch.testing.assert_close(next(r for r in results if r.shape == expected.shape), expected)
        assert before + 1 == sum(n for r, n in session.counters.padded.items() if r.startswith(why))

    @pytest.mark.parametrize(
        "options", [{"form": "bins"}, {"outputs": "flat"}, {"buckets": -1}, {"form": "rows", "buckets": 3}]
    )
    def test_options_that_do_not_exist(self, options):
        with pytest.raises(ArgumentError, match="prepack"):
            thresher.Recipe.of(prepack=options)


class TestHostSync:
    def test_a_call_reads_the_device_once(self, llama, monkeypatch):
        _, ours = llama
        inputs = zoo.tokens(masks.mixed((5, 8, 12)))
        session = session_of(ours)
        given = arguments(session, inputs["input_ids"], inputs["attention_mask"])
        session(given, {})
        reads, body = [], session._lowered_body()
        run = body.run
        monkeypatch.setattr(body, "run", lambda *a: (reads.append("body"), run(*a))[1])
        for name in ("tolist", "item", "__bool__", "__int__"):
            inner = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda t, inner=inner, name=name: (reads.append(name), inner(t))[1]
            )
        session(given, {})
        assert reads[: reads.index("body")] == ["tolist"]


class TestBypass:
    def test_no_padding_is_bit_identical_to_the_model_as_it_was(self, llama):
        model, ours = llama
        inputs = zoo.tokens(masks.right((9, 9, 9)))
        before = session_of(ours).counters.padded["The batch has no padding."]
        assert torch.equal(ours(**inputs).logits, expected_of(model, inputs).logits)
        assert session_of(ours).counters.padded["The batch has no padding."] == before + 1

    def test_empty_batches_and_single_tokens_run_padded(self, llama):
        model, ours = llama
        for mask in (masks.right((0, 0, 0), 12), masks.right((1, 0, 0), 12)):
            inputs = zoo.tokens(mask)
            assert torch.equal(ours(**inputs).logits, expected_of(model, inputs).logits)
        assert session_of(ours).counters.padded["The batch has fewer than two real tokens."] >= 2

    def test_without_padding_what_other_passes_did_runs_all_the_same(self):
        """The padded program lacks it: its results, and a proof on such an example, would be another model's."""
        model, _ = zoo.ZOO["llama"].build()
        full, other = zoo.tokens(masks.right((9, 9, 9))), zoo.tokens(masks.right((9, 9, 4)))
        nvfp4 = {"min_weights": 0, "budget": 2.0}
        alone = thresher.compile(model, full, target="reference", nvfp4=nvfp4)
        ours = thresher.compile(model, full, target="reference", nvfp4=nvfp4, prepack={"min_gain": 9.0})
        torch.testing.assert_close(ours(**full).logits, alone(**full).logits, atol=1e-5, rtol=1e-5)
        assert 0 < ours.report["nvfp4"].error == pytest.approx(alone.report["nvfp4"].error, rel=1e-3)
        ours(**other)
        assert ours.counters[0].packed == 3 and not ours.counters[0].padded

    def test_a_gain_below_the_threshold_is_not_worth_it(self):
        model, inputs = zoo.ZOO["llama"].build()
        torch._dynamo.reset()
        ours = thresher.compile(model, inputs, target="reference", prepack={"min_gain": 2.0}, verify=False)
        long, short = zoo.tokens(masks.right((11, 12, 12))), zoo.tokens(masks.right((2, 12, 1)))
        ours(**long)
        ours(**short)
        assert ours.counters[0].padded == {"The predicted gain is below min_gain=2.": 2}  # the example too
        assert ours.counters[0].packed == 1

    @pytest.mark.parametrize("shape", [(1, 9), (3, 1)])
    def test_one_row_or_one_column_has_no_padding_between_rows(self, shape):
        """A decoding step has one column: it runs as it was, and says so."""
        model, _ = zoo.ZOO["llama"].build()
        inputs = zoo.tokens(torch.ones(shape, dtype=torch.int64))
        torch._dynamo.reset()
        with pytest.warns(thresher.ThresherWarning, match="dimension is 1"):
            ours = leniently.compile(model, inputs)
        torch.testing.assert_close(ours(**inputs).logits, expected_of(model, inputs).logits)

    def test_the_predicted_gain_is_flops_over_flops(self):
        packing = Packing(token_cost=10, pair_cost=1, causal=True)
        padded, packed = 2 * 8 * (10 + 8), 10 * 10 + (64 + 4) / 2
        assert packing.gain([8, 2], 8) == pytest.approx(padded / packed)
        assert packing.gain([0, 0], 8) == 1.0


class TestCounters:
    def test_tokens_positions_and_compilations(self):
        model, inputs = zoo.ZOO["bert"].build()
        torch._dynamo.reset()
        ours = thresher.compile(model, inputs, target="reference", verify=False)
        ours(**inputs)
        ours(**zoo.tokens(masks.right((12, 12, 12))))
        (counters,) = ours.counters
        assert (counters.calls, counters.packed, sum(counters.padded.values())) == (3, 2, 1)
        assert (counters.tokens, counters.positions) == (2 * 25, 2 * 36)
        assert counters.padding == pytest.approx(1 - 25 / 36)
        assert counters.lowered == 2  # the body, and the padded program for the batch without padding

    def test_a_packed_body_is_lowered_by_the_first_batch_that_has_padding(self):
        model, _ = zoo.ZOO["bert"].build()
        torch._dynamo.reset()
        full = zoo.tokens(masks.right((12, 12, 12)))
        ours = thresher.compile(model, full, target="reference", verify=False)
        assert ours.counters[0].lowered == 1 and ours.counters[0].packed == 0
        ours(**zoo.tokens(masks.right((12, 3, 12))))
        assert ours.counters[0].lowered == 2 and ours.counters[0].packed == 1


class TestBuckets:
    @pytest.mark.parametrize("name", ["t5_encoder", "gpt2"])
    def test_filler_reaches_no_result(self, name):
        model, _ = zoo.ZOO[name].build()
        mask = masks.holed((5, 7, 12))
        inputs = zoo.tokens(mask)
        torch._dynamo.reset()
        ours = thresher.compile(model, inputs, target="reference", prepack={"buckets": 2}, verify=False)
        packed = []
        body = ours.sessions[0]._lowered_body()
        body.run = lambda *a, run=body.run: packed.append(run(*a)) or packed[-1]
        actual, expected = ours(**inputs)[0], expected_of(model, inputs)[0]
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)
        sizes = {s for t in packed[0] for s in t.shape}
        assert int(mask.sum()) not in sizes and 64 in sizes  # the body saw a bucket, not the tokens


class TestPackedOutputs:
    def test_logits_come_back_per_token_and_the_cache_padded(self):
        model, _ = zoo.ZOO["llama"].build()
        mask = masks.mixed((5, 8, 12))
        torch._dynamo.reset()
        ours = thresher.compile(
            model, zoo.tokens(mask), target="reference", prepack={"outputs": "packed"}, verify=False
        )
        full = masks.right((12, 12, 12))
        for real in (mask, full):  # packed, and bypassed
            expected = expected_of(model, zoo.tokens(real))
            actual = ours(**zoo.tokens(real))
            assert actual.logits.shape == (1, int(real.sum()), 96)
            torch.testing.assert_close(actual.logits[0], expected.logits[real.bool()], atol=2e-5, rtol=1e-5)
            assert actual.past_key_values.layers[0].keys.shape == (3, 2, 12, 8)


class TestWeights:
    def test_replaced_weights_are_used(self):
        model, inputs = zoo.ZOO["llama"].build()
        torch._dynamo.reset()
        ours = thresher.compile(model, inputs, target="reference", verify=False)
        other = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
        model.load_state_dict(other, assign=True)
        real = inputs["attention_mask"].bool()
        expected = expected_of(model, inputs).logits
        torch.testing.assert_close(ours(**inputs).logits[real], expected[real], atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            model.lm_head.weight.mul_(3)
        torch.testing.assert_close(ours(**inputs).logits[real], 3 * expected[real], atol=6e-5, rtol=1e-5)
