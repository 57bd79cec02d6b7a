"""Token pruning on small random decoders: what is kept, what stays exact, and what is refused."""

import leniently
import pytest
import torch
from pruned import by_hand, pruned
from sampled import sampled
from tiny_llama import IMAGE, SPAN, TOKENS, make, prompt

import thresher
from thresher.passes.transprune.scores import POLICIES

OPTIONS = dict(image_token_id=IMAGE, min_image_tokens=8, bucket=1, min_saving=0.0)
SCORED = [p for p in POLICIES if p != "given"]


@pytest.fixture(scope="module")
def model():
    return make()


def compiled(model, inputs, dynamic=None, **options):
    torch._dynamo.reset()
    if torch.is_tensor(inputs):
        inputs = dict(input_ids=inputs, use_cache=False)
    return leniently.compile(model, inputs, dynamic=dynamic, transprune={**OPTIONS, **options})


def run(call, ids, **more):
    return call(input_ids=ids, use_cache=False, **more).logits


def kept(call):
    return call.sessions[-1].extras


@pytest.fixture(scope="module")
def dense(model):
    """Logits [2, TOKENS, 97] of the unpruned model, through the same attention operator."""
    torch._dynamo.reset()
    inputs = dict(input_ids=prompt(), use_cache=False)
    return thresher.compile(model, inputs, target="reference", causal_mask=True)(**inputs).logits


@pytest.mark.parametrize(
    "policy",
    sampled(["transprune"], SCORED),
)
def test_a_budget_of_all_tokens_changes_not_one_bit(model, dense, policy):
    ids = prompt()
    call = compiled(model, ids, policy=policy, stages=((1, 1.0), (2, 1.0)), always=True)
    report = call.report["transprune"]
    assert report.rewritten and report.error == 0.0
    assert torch.equal(run(call, ids), dense)


@pytest.mark.parametrize(
    "policy, mode",
    [
        ("transprune", "paper"),
        ("fastv", "paper"),
        pytest.param("uniform", "paper", marks=pytest.mark.thorough),
        pytest.param("transprune", "official_code", marks=pytest.mark.thorough),
    ],
)
@torch.no_grad()
def test_pruned_layers_are_the_models_own_on_the_kept_tokens(model, policy, mode):
    ids = prompt()
    call = compiled(model, ids, policy=policy, mode=mode, stages=((1, 0.5), (2, 0.25)))
    logits = run(call, ids)
    cuts = {1: kept(call)["kept.1"], 2: kept(call)["kept.2"]}
    assert [c.shape[1] for c in cuts.values()] == [TOKENS - 16, TOKENS - 24]
    text = (ids != IMAGE).sum(1)
    for index in cuts.values():
        assert (index.diff() > 0).all(), "rising, none twice"
        assert ((ids.gather(1, index) != IMAGE).sum(1) == text).all(), "text is never left out"
    expected, at = by_hand(model, ids, cuts)
    actual = logits[torch.arange(2)[:, None], at]
    assert torch.equal(actual, expected), "bit by bit, the same operators on the same shapes"
    gone = torch.ones(2, TOKENS, dtype=torch.bool).scatter_(1, at, False)
    assert (logits[gone] == 0).all()


@torch.no_grad()
def test_policies_rank_as_their_formulas_say(model):
    """Written out again with full attention maps."""
    ids = prompt()
    inner = model.model
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(TOKENS)[None]
    cos, sin = rotary = inner.rotary_emb(hidden, positions)
    first, second = inner.layers[:2]
    image = ids == IMAGE

    def maps(layer, x):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        x = layer.input_layernorm(x)
        shape = (2, TOKENS, -1, 8)
        q = layer.self_attn.q_proj(x).view(shape).transpose(1, 2)
        k = layer.self_attn.k_proj(x).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
        hidden_ones = ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        return scores.masked_fill(hidden_ones, -torch.inf).softmax(-1)

    x = hidden
    moved = first.self_attn(first.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
    middle = x + moved
    fed = first.mlp(first.post_attention_layernorm(middle))
    after = middle + fed
    behind = SPAN.stop
    iga = maps(second, after)[:, :, behind:].mean((1, 2))
    ttv = 0
    for a, f in ((x, moved), (middle, fed)):
        size = f.norm(dim=-1) / a.norm(dim=-1)
        turn = 1 - torch.cosine_similarity(a, f, dim=-1).abs()
        ttv = ttv + turn.masked_fill(~image, -torch.inf).softmax(-1) * size
    expected = {
        "iga": iga,
        "pyramiddrop": maps(second, after)[:, :, -1].mean(1),
        "fastv": maps(first, x)[:, :, -1].mean(1),
        "ttv": ttv,
        "transprune": (ttv + iga) / 2,
    }
    for policy, score in expected.items():
        _, extras = pruned(model, dict(input_ids=ids), dict(OPTIONS, policy=policy, stages=((1, 0.25),)))
        best = score.masked_fill(~image, torch.inf).topk(TOKENS - 24).indices.sort().values
        assert torch.equal(extras["kept.1"], best), policy


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.thorough), True])
@torch.no_grad()
def test_calls_with_other_image_counts_get_programs_of_their_own(model, dynamic):
    ids = prompt()
    call = compiled(model, ids, dynamic=dynamic, policy="uniform", stages=((1, 0.5),), bucket=8)
    few, none, more = prompt(), prompt(), prompt()
    few[:, 20:36] = 5  # 16 image tokens are left
    none[none == IMAGE] = 5
    more[:, 36:38] = IMAGE
    for batch, length in ((ids, 16), (few, 8), (none, 0), (more, 16), (few, 8)):
        logits = run(call, batch)
        index = kept(call).get("kept.1")
        if not length:
            torch.testing.assert_close(logits, run(model, batch), rtol=1e-5, atol=1e-5)
        else:
            assert index.shape[1] == TOKENS - length
            cut = {1: index}
            expected, at = by_hand(model, batch, cut)
            torch.testing.assert_close(logits[torch.arange(2)[:, None], at], expected, rtol=1e-5, atol=1e-5)
    session = call.sessions[-1]
    assert len(session.variants) == 2 and sum(session.ran.values()) >= 5


@torch.no_grad()
def test_rows_do_not_depend_on_each_other(model):
    ids = prompt(3)
    ids[1, 40:44] = IMAGE  # other spans
    ids[2, 4:8] = 7
    together = compiled(model, ids, stages=((1, 0.5),), instruction=4)
    logits = run(together, ids)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(run(together, ids[order]), logits[order], atol=1e-6)


@pytest.mark.parametrize(
    "side, position", [pytest.param("left", "kept", marks=pytest.mark.thorough), ("right", "renumbered")]
)
@torch.no_grad()
def test_padding_goes_first_and_changes_nothing(model, side, position):
    ids = prompt(2)
    pad = torch.zeros(2, 12, dtype=torch.long)
    mask = torch.ones(2, TOKENS + 12, dtype=torch.long)
    if side == "left":
        wide, mask[:, :12] = torch.cat([pad, ids], 1), 0
    else:
        wide, mask[:, TOKENS:] = torch.cat([ids, pad], 1), 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inputs = dict(input_ids=wide, attention_mask=mask, position_ids=positions, use_cache=False)
    call = compiled(model, inputs, policy="transprune", stages=((1, 0.5),), position=position)
    padded = call(**inputs).logits[mask.bool()].view(2, TOKENS, -1)
    assert kept(call)["kept.1"].shape[1] == TOKENS - 16
    alone = run(compiled(model, ids, policy="transprune", stages=((1, 0.5),), position=position), ids)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_results_can_be_restored_three_ways(model):
    ids = prompt()
    options = dict(OPTIONS, stages=((1, 0.5), (2, 0.25)))
    (zeros, _), (short, extras), (passed, _) = (
        pruned(model, dict(input_ids=ids), dict(options, restore=way))
        for way in ("zeros", "none", "passthrough")
    )
    at = extras["kept.2"]
    assert torch.equal(short, zeros[torch.arange(2)[:, None], at])
    assert torch.equal(passed[torch.arange(2)[:, None], at], short)
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    left = next(t for t in range(TOKENS) if t not in extras["kept.1"][0])
    expected = model.lm_head(model.model.norm(states[1][0, left]))  # what it was when it left
    torch.testing.assert_close(passed[0, left], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_reserve_is_spread_over_the_image(model):
    ids = prompt()
    call = compiled(model, ids, policy="iga", stages=((1, 0.25),), reserve=1.0)
    run(call, ids)
    image = kept(call)["kept.1"][0]
    image = image[(image >= SPAN.start) & (image < SPAN.stop)]
    assert len(image) == 8 and set(image.diff().tolist()) == {4}


@torch.no_grad()
def test_scores_and_types_can_be_given(model):
    embeddings = model.model.embed_tokens(prompt())
    types = torch.zeros(2, TOKENS, dtype=torch.int8)
    types[:, SPAN] = 1
    scores = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1))
    inputs = dict(inputs_embeds=embeddings, use_cache=False)
    options = dict(policy="given", stages=((1, 0.25),), image_token_id=None)
    with thresher.token_types(types, scores):
        call = compiled(model, inputs, **options)
        call(**inputs)
    best = scores.masked_fill(types == 0, 2.0).topk(TOKENS - 24).indices.sort().values
    assert torch.equal(kept(call)["kept.1"], best)
    dense = call(**inputs).logits  # outside the context nobody knows what is an image
    torch.testing.assert_close(dense, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(image_token_id=95, stages=((1, 0.5),)), "No token may be left out"),
        (dict(min_image_tokens=33, stages=((1, 0.5),)), "at least 33"),
        (dict(stages=((3, 0.5),)), "layers 3 in a row"),
        (dict(stages=((1, 1.0),)), "No token may be left out"),
        (dict(stages=((2, 0.9),), min_saving=0.3), "min_saving"),
    ],
)
def test_what_cannot_be_pruned_stays_and_says_why(model, options, reason):
    ids = prompt()
    call = compiled(model, ids, **options)
    report = call.report["transprune"]
    assert not report.rewritten and any(reason in miss.reason for miss in report.missed), report
    torch.testing.assert_close(run(call, ids), run(model, ids), rtol=1e-5, atol=1e-5)


def test_no_layer_is_pruned_beyond_one_that_cannot_be_followed():
    model = make(_attn_implementation="eager")
    report = compiled(model, prompt(), stages=((1, 0.5),)).report["transprune"]
    assert not report.rewritten and "cannot be run on fewer tokens" in report.missed[0].reason


def test_types_of_another_shape_than_the_call_are_named(model):
    ids = prompt()
    with thresher.token_types(torch.ones(2, 10, dtype=torch.int8)):
        report = compiled(model, ids, image_token_id=None, stages=((1, 0.5),)).report["transprune"]
    assert not report.rewritten and "was given [2, 10]" in report.missed[0].reason, report


def test_the_smallest_share_keeps_one_image_token(model):
    ids = prompt()
    call = compiled(model, ids, policy="uniform", stages=((1, 1e-6),))
    run(call, ids)
    assert ((ids.gather(1, kept(call)["kept.1"]) == IMAGE).sum(1) == 1).all()


def test_fifty_calls_with_other_spans_need_one_program_a_bucket(model):
    ids = prompt()
    call = compiled(model, ids, policy="uniform", stages=((1, 0.5),), bucket=4)
    compiled_before = len(call.sessions)
    make = torch.Generator().manual_seed(3)
    drops = set()
    for _ in range(50):
        batch = torch.randint(1, IMAGE, (2, TOKENS), generator=make)
        start, length = (
            int(torch.randint(0, 8, (), generator=make)),
            int(torch.randint(16, 33, (), generator=make)),
        )
        batch[:, start : start + length] = IMAGE
        run(call, batch)
        drops.add(length // 2 // 4 * 4)
    session = call.sessions[0]
    assert len(call.sessions) == compiled_before == 1
    assert len(session.variants) + 1 <= len(drops | {16})
