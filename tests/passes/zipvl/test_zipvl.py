"""ZipVL on small random decoders: the chosen tokens attend as if alone, all others get zeros."""

import leniently
import pytest
import tiny_llama
import torch
import zip_by_hand
from factored import factored
from zip_by_hand import OPTIONS

import thresher
from thresher.errors import ArgumentError

TOKENS = 60


@pytest.fixture(scope="module")
def model():
    return zip_by_hand.make_model(2)


def prompt(batch=2, seed=0):
    return tiny_llama.prompt(batch, TOKENS, seed, span=None)


def compiled(model, inputs, **options):
    torch._dynamo.reset()
    stats = {"stats": options.pop("stats")} if "stats" in options else {}
    inputs = dict(input_ids=inputs, use_cache=False) if torch.is_tensor(inputs) else inputs
    return leniently.compile(model, inputs, zipvl={**OPTIONS, **options}, **stats)


@pytest.mark.parametrize("gather", ["projections", "attention"])
@torch.no_grad()
def test_it_is_the_method_as_written(model, gather):
    ids = prompt()
    call = compiled(model, ids, keep=0.4, gather=gather)
    expected, _ = zip_by_hand.run(model, ids, zip_by_hand.count(TOKENS, 0.4))
    actual = call(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    held = call.sessions[-1].extras["realised_tau"]
    assert held.shape == (2, 2) and ((held > 0.3) & (held <= 1)).all()
    account = call.report["zipvl"]
    assert 0.3 < account.flops_left < 1, account
    # sites are priced in times the speed, never in FLOPs: a tiny layer gains nothing, and surely not a thousandfold
    assert list(account.predicted) == account.rewritten and 0.2 < account.predicted[account.rewritten[0]] < 5


@pytest.mark.parametrize("gather", ["projections", pytest.param("attention", marks=pytest.mark.thorough)])
@torch.no_grad()
def test_all_tokens_important_is_dense(model, gather):
    ids = prompt()
    call = compiled(model, ids, keep=1.0, gather=gather)
    assert call.report["zipvl"].error < 1e-6
    torch.testing.assert_close(
        call(input_ids=ids, use_cache=False).logits, model(ids).logits, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_padding_is_never_important_and_changes_nothing(model):
    ids = prompt(2)
    pad = torch.zeros(1, 10, dtype=torch.long)
    wide = torch.cat([torch.cat([pad, ids[:1]], 1), torch.cat([ids[1:], pad], 1)])
    mask = torch.ones_like(wide)
    mask[0, :10], mask[1, TOKENS:] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inputs = dict(input_ids=wide, attention_mask=mask, position_ids=positions, use_cache=False)
    call = compiled(model, inputs, keep=0.99)
    actual = call(**inputs).logits[mask.bool()].view(2, TOKENS, -1)
    assert (call.sessions[-1].extras["realised_tau"] > 0.99).all()
    expected = compiled(model, ids, keep=1.0)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_shares_are_calibrated_to_hold_tau(model, tmp_path):
    batches = [dict(input_ids=prompt(seed=s), use_cache=False) for s in range(3)]
    options = {**OPTIONS, "tau": 0.8}
    torch._dynamo.reset()
    path = tmp_path / "shares.safetensors"
    thresher.calibrate(model, batches, zipvl=options).save(path)
    ids = prompt(seed=9)
    call = compiled(model, ids, tau=0.8, stats=str(path))
    assert call.report["zipvl"].rewritten
    call(input_ids=ids, use_cache=False)
    assert (call.sessions[-1].extras["realised_tau"] > 0.75).all()
    torch._dynamo.reset()
    dry = thresher.explain(model, dict(input_ids=ids, use_cache=False), zipvl=options)
    reasons = [m.reason for m in dry.report["zipvl"].missed]
    assert len(reasons) == 2 and all("needs calibration" in r for r in reasons)


def test_the_quantile_of_the_calibrated_shares_is_taken(model, tmp_path):
    """The three prompts need different shares; the note says which were taken for the two layers."""
    batches = [dict(input_ids=prompt(seed=s), use_cache=False) for s in range(3)]
    torch._dynamo.reset()
    found = thresher.calibrate(model, batches, zipvl={**OPTIONS, "tau": 0.8})
    path = tmp_path / "shares.safetensors"
    found.save(path)
    shares = [s["shares"].double() for s in found["zipvl"].values() if "shares" in s]
    assert all(s.min() < s.max() for s in shares)
    for quantile in (0.01, 0.5, 1.0):
        torch._dynamo.reset()
        options = {**OPTIONS, "tau": 0.8, "quantile": quantile}
        report = thresher.explain(model, batches[0], zipvl=options, stats=str(path)).report["zipvl"]
        (note,) = [n for n in report.notes if "share of tokens that attend" in n]
        said = [float(s) for s in note.rsplit(": ", 1)[1].rstrip(".").split(", ")]
        assert said == [round(float(torch.quantile(s, quantile)), 2) for s in shares]


@torch.no_grad()
def test_layers_before_the_first_are_left_as_they_are_and_say_so(model):
    ids = prompt()
    account = compiled(model, ids, keep=0.4, first_layer=2).report["zipvl"]
    assert account.rewritten == ["model.layers.1"]
    (missed,) = account.missed
    assert missed.site == "model.layers.0.self_attn" and "first_layer=2 leaves it as it is" in missed.reason


@torch.no_grad()
def test_text_is_protected_unless_as_published(model):
    ids = prompt()
    ids[:, 10:50] = 96
    chosen = {}
    for mode in ("protected", "paper"):
        call = compiled(
            model,
            dict(input_ids=ids, use_cache=True),
            keep=0.2,
            mode=mode,
            kv="drop",
            image_token_id=96,
        )
        out = call(input_ids=ids, use_cache=True)
        chosen[mode] = call.sessions[-1].extras["important.0"]
        assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [chosen[mode].shape[1]] * 2
    text = torch.cat([torch.arange(10), torch.arange(50, 60)])
    assert all(torch.isin(text, row).all() for row in chosen["protected"])
    assert not all(torch.isin(text, row).all() for row in chosen["paper"])


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(keep=0.9, min_saving=0.5), "min_saving"),
        (dict(keep=0.4, recent=40, spread=40), "80 are probed"),
    ],
)
def test_what_would_not_pay_stays_and_says_why(model, options, reason):
    report = compiled(model, prompt(), **options).report["zipvl"]
    assert not report.rewritten and all(reason in m.reason for m in report.missed), report.missed


def test_windows_and_spelled_out_attention_are_left_alone():
    import zoo

    for name, reason in (("mistral", "window"), ("gemma2", "spelled eager")):
        model, inputs = zoo.ZOO[name].build()
        report = compiled(model, {**inputs, "use_cache": False}, keep=0.5, recent=1, spread=1).report["zipvl"]
        assert not report.rewritten and any(reason in m.reason for m in report.missed), report.missed


@pytest.mark.parametrize(
    "options",
    [
        dict(mode="x"),
        dict(gather="x"),
        dict(kv="x"),
        dict(keep=0.0),
        dict(tau=1.5),
        dict(recent=0),
        dict(bucket=0),
    ],
)
def test_options_that_make_no_sense_are_named(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        thresher.Recipe.of(None, zipvl=options)


@pytest.mark.parametrize("options", [{"zipvl": {"keep": 0.5}}, {"transprune": {"image_span": [1, 3]}}])
def test_attention_in_no_layer_is_a_miss(options):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    torch._dynamo.reset()
    given = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    found = thresher.explain(Attend().eval(), tuple(given), recipe="none", **options)
    (missed,) = found.report.passes[0].missed
    assert missed.reason.startswith(
        "No layers on a residual stream were recovered in this graph. The first thing"
    )


@pytest.mark.parametrize("gather", ["projections", "attention"])
@torch.no_grad()
def test_a_scale_on_queries_and_keys_counts_once(model, gather):
    ids = prompt()
    call = compiled(factored(model), ids, keep=0.4, gather=gather)
    expected, _ = zip_by_hand.run(model, ids, zip_by_hand.count(TOKENS, 0.4))
    torch.testing.assert_close(call(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_shares_are_the_same_with_a_scale_on_queries_and_keys(model):
    found = []
    for each in (model, factored(model)):
        torch._dynamo.reset()
        made = thresher.calibrate(
            each, [dict(input_ids=prompt(), use_cache=False)], zipvl={**OPTIONS, "tau": 0.8}
        )
        found.append([s["shares"] for s in made["zipvl"].values() if "shares" in s])
    assert len(found[0]) == 2 and all(map(torch.equal, *found))
