"""ZipVL where sequences are packed, or where token pruning left tokens out before: each as it would be alone."""

import itertools

import captures
import pytest
import tiny_llama
import torch
import zip_by_hand
from tiny_llama import IMAGE
from zip_by_hand import OPTIONS

import thresher
from thresher import given_tokens
from thresher.backend import run_pipeline
from thresher.errors import ArgumentError
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime.compare import run_plainly

LENGTHS = (50, 9, 31)  # the second has fewer tokens than are probed, so that all of them attend
PRUNE = dict(image_token_id=IMAGE, min_image_tokens=8, bucket=1, min_saving=0.0, stages=((1, 0.75), (2, 0.5)))


@pytest.fixture(scope="module")
def model():
    return zip_by_hand.make_model(3)


@pytest.fixture(scope="module")
def padded():
    """A batch of mixed lengths, padded on either side."""
    ids = tiny_llama.prompt(3, max(LENGTHS), span=None)
    mask = torch.ones_like(ids)
    mask[1, : max(LENGTHS) - LENGTHS[1]] = 0
    mask[2, LENGTHS[2] :] = 0
    return dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))


def compiled(model, inputs, **recipe):
    torch._dynamo.reset()
    return thresher.compile(model, inputs, target="reference", **recipe)


def rows(inputs):
    """(row, where its tokens are, its tokens alone)."""
    for row, real in enumerate(inputs["attention_mask"].bool()):
        yield row, real, inputs["input_ids"][row : row + 1, real]


@pytest.mark.parametrize("gather", ["projections", pytest.param("attention", marks=pytest.mark.thorough)])
@torch.no_grad()
def test_each_packed_sequence_is_treated_as_alone(model, padded, gather):
    inputs = dict(padded, use_cache=True)
    recipe = dict(prepack=True, zipvl=dict(OPTIONS, keep=0.3, gather=gather, kv="quantize"))
    call = compiled(model, inputs, **recipe)
    assert call.report["prepack"].rewritten and call.report["zipvl"].rewritten, call.report
    out = call(**inputs)
    layers = out.past_key_values.layers
    for row, real, ids in rows(padded):
        count = ids.shape[1] if ids.shape[1] <= 12 else zip_by_hand.count(ids.shape[1], 0.3)
        expected, importance = zip_by_hand.run(model, ids, count)
        torch.testing.assert_close(out.logits[row : row + 1, real], expected, rtol=1e-4, atol=1e-4)
        for layer, scores in zip(layers, importance, strict=True):
            found = given_tokens.about(layer.keys)["scores"][row]
            torch.testing.assert_close(found[real][None], scores, rtol=1e-4, atol=1e-5)
            assert not found[~real].any() and layer.keys.shape[2] == real.shape[0]
    held = call.sessions[-1].extras["realised_tau"]
    assert held.shape == (3, 3) and (held[:, 1] == 1).all() and ((held > 0.2) & (held <= 1)).all()
    full = dict(inputs, attention_mask=torch.ones_like(padded["attention_mask"]))
    call(**full)
    counters = call.sessions[-1].counters
    assert not counters.padded, "batches without padding are packed too"
    assert counters.lowered == 1, "one program for all lengths"


@torch.no_grad()
def test_all_packed_tokens_important_is_packed_attention(model, padded):
    call = compiled(model, dict(padded, use_cache=False), prepack=True, zipvl=dict(OPTIONS, keep=1.0))
    assert call.report["zipvl"].rewritten and call.report["zipvl"].error < 1e-6


@torch.no_grad()
def test_layers_behind_a_cut_are_rewritten_on_their_shorter_sequence(model):
    ids = tiny_llama.prompt()
    inputs = dict(input_ids=ids, use_cache=False)
    call = compiled(model, inputs, transprune=PRUNE, zipvl=dict(OPTIONS, keep=0.3, image_token_id=IMAGE))
    sites = call.report["zipvl"].rewritten[0].split(", ")
    assert len(sites) == 3 and not call.report["zipvl"].missed and call.certificate.holds
    logits, extras = call(**inputs).logits, call.sessions[-1].extras
    inner, hidden = model.model, model.model.embed_tokens(ids)
    at = torch.arange(48).expand(2, -1)
    for number, layer in enumerate(inner.layers):
        if number:
            kept = extras[f"kept.{number}"]
            hidden = hidden.gather(1, torch.searchsorted(at, kept)[..., None].expand(-1, -1, 32))
            at = kept
        text = ids.gather(1, at) != IMAGE
        count = zip_by_hand.count(at.shape[1], 0.3, 16)
        _, hidden = zip_by_hand.tokens_attend(layer, hidden, inner.rotary_emb(hidden, at), count, text)
    expected = model.lm_head(inner.norm(hidden))
    torch.testing.assert_close(logits[torch.arange(2)[:, None], at], expected, rtol=1e-4, atol=1e-4)
    assert extras["realised_tau"].shape == (3, 2)


@torch.no_grad()
def test_important_keys_behind_a_cut_keep_their_places_in_the_prompt(model):
    inputs = dict(input_ids=tiny_llama.prompt(), use_cache=True)
    options = dict(OPTIONS, keep=0.3, image_token_id=IMAGE, kv="drop")
    call = compiled(model, inputs, transprune=dict(PRUNE, policy="uniform"), zipvl=options)
    out, extras = call(**inputs), call.sessions[-1].extras
    for number, layer in enumerate(out.past_key_values.layers):
        places = given_tokens.about(layer.keys)["kept"]
        assert torch.equal(places, extras[f"important.{number}"]) and layer.keys.shape[2] == places.shape[1]
        if number:
            kept = extras[f"kept.{number}"]
            assert all(torch.isin(p, k).all() for p, k in zip(places, kept))


@torch.no_grad()
def test_packed_pruned_and_zipped_each_is_as_alone(model):
    ids = tiny_llama.prompt(3)
    ids[1, 4:14] = 7  # other image counts
    mask = torch.ones_like(ids)
    mask[0, 44:], mask[2, :2] = 0, 0
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    prune = dict(
        PRUNE,
        stages=((1, 0.5),),
        policy="uniform",
        reserve=0.5,
        reserve_by="attention",
        position="renumbered",
    )
    recipe = dict(transprune=prune, zipvl=dict(OPTIONS, keep=0.3, image_token_id=IMAGE))
    call = compiled(model, dict(inputs, use_cache=False), prepack=True, **recipe)
    assert [len(p.rewritten) for p in call.report.passes] == [1, 1, 1], call.report
    out = call(**inputs, use_cache=False).logits
    chosen = Recipe.of(None, verify=False, **recipe)
    for row, real, alone in itertools.islice(rows(inputs), 2):
        program = captures.export(model, dict(input_ids=alone))
        after, report = run_pipeline(program, chosen, captures.arguments(program, dict(input_ids=alone)))
        assert report["zipvl"].rewritten, report
        expected = run_plainly(after, [alone], Reference())[0]
        torch.testing.assert_close(out[row : row + 1, real], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_packed_programs_cannot_have_is_said(model, padded, tmp_path):
    program = captures.export(model, dict(padded), dynamic=True)
    given = captures.arguments(program, padded)

    def reason(**options):
        chosen = Recipe.of(None, verify=False, prepack=True, zipvl=dict(OPTIONS, keep=0.3, **options))
        _, report = run_pipeline(program, chosen, given)
        return report["zipvl"].missed[0].reason

    assert "image_token_id only" in reason(image_span=(2, 8))
    assert "80 are probed" in reason(recent=40, spread=40)
    chosen = Recipe.of(None, verify=False, prepack=True, zipvl=dict(OPTIONS, keep=0.3))
    counted, _ = run_pipeline(program, chosen, given)
    with pytest.raises(ArgumentError, match="number of attending tokens"):
        thresher.save(counted, tmp_path / "never.thresher")
    with pytest.raises(ArgumentError, match="number of attending tokens"):
        thresher.export_onnx(counted, padded, tmp_path / "never.onnx")
