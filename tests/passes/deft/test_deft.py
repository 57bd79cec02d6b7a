"""The sparse MLP rewrite: which sites it finds, which it must leave alone, and what it does to the numbers."""

import captures
import pytest
import torch
import transformers as hf
import zoo
from feed_forward import ALL, DOWN, MLP, Feed, build, compiled, targets
from torch.nn import functional as F

import thresher
from thresher.errors import ArgumentError


def roberta(act):
    return hf.RobertaModel(hf.RobertaConfig(**zoo.ENCODER, **zoo.WIDTH, hidden_act=act))


def t5(form):
    sizes = dict(vocab_size=96, pad_token_id=0, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, feed_forward_proj=form, decoder_start_token_id=0, use_cache=False)
    )


def t5_inputs():
    return {**zoo.tokens(), "decoder_input_ids": zoo.tokens()["input_ids"][:, :5]}


def gpt2_relu():
    sizes = dict(n_embd=32, n_inner=48, n_head=4, n_layer=2, n_positions=64)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**zoo.TOKENS, **sizes, activation_function="relu"))


def phi3_relu():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**zoo.DECODER, num_key_value_heads=2, hidden_act="relu"))


def bert_relu():
    return hf.BertModel(hf.BertConfig(**zoo.ENCODER, **zoo.WIDTH, hidden_act="relu"))


# Every MLP of these must be found, and becomes these operators.
LIST = {
    "bert": (bert_relu, zoo.tokens, [DOWN] * 2),
    "roberta": (lambda: roberta("relu"), zoo.tokens, [DOWN] * 2),
    "gpt2, Conv1D": (gpt2_relu, zoo.tokens, [DOWN] * 2),
    "opt": (zoo.ZOO["opt"].make, zoo.tokens, [DOWN] * 2),
    "t5": (lambda: t5("relu"), t5_inputs, [DOWN] * 4),
    "t5, gated": (lambda: t5("gated-relu"), t5_inputs, [MLP] * 4),
    "llama, ReGLU": (zoo.ZOO["llama_reglu"].make, zoo.tokens, [MLP] * 2),
    "arcee, squared ReLU": (zoo.ZOO["arcee"].make, zoo.tokens, [DOWN] * 2),
    "phi3, fused gate_up": (phi3_relu, zoo.tokens, [MLP] * 2),
}


CORE = ("gpt2, Conv1D", "opt", "phi3, fused gate_up", "t5, gated", "llama, ReGLU")


@pytest.mark.parametrize(
    "name", [n if n in CORE else pytest.param(n, marks=pytest.mark.thorough) for n in LIST]
)
def test_every_site_is_found_and_computes_the_same(name):
    make, inputs, expected = LIST[name]
    torch.manual_seed(zoo.SEED)
    model = make()
    zoo.spread(model)
    model.eval()
    batch = inputs()
    done = compiled(model, batch)
    assert targets(done) == expected
    account = done.report["deft"]
    assert not account.missed and len(account.rewritten) == len(expected) and account.error <= 1e-5
    with torch.no_grad():
        expected_out = model(**batch)[0]
    torch.testing.assert_close(done(**batch)[0], expected_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(bias=False),
        dict(act=lambda x: F.relu(x).square()),
        dict(act=lambda x: F.relu(x) * F.relu(x)),
        dict(act=F.hardswish),
        dict(act=F.relu6),
        dict(act=lambda x: x.clamp_min(0)),
    ],
    ids=["bias", "no bias", "square", "product with itself", "hardswish", "relu6", "clamp"],
)
def test_flat_zeros_in_every_spelling(options):
    model, x = build(Feed(**options))
    done = compiled(model, x)
    assert targets(done) == [DOWN] * 2 and not done.report["deft"].missed
    torch.testing.assert_close(done(x), model(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("up_act", [None, F.relu], ids=["ReGLU", "dReLU"])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlps_skip_the_up_projection_too(fused, up_act, bias):
    model, x = build(Feed(gated=True, fused=fused, up_act=up_act, bias=bias))
    done = compiled(model, x)
    assert targets(done) == [MLP] * 2
    torch.testing.assert_close(done(x), model(x))
    (session,) = done.sessions
    names = [w.fqn for w in session.program.weights.values()]
    assert not any(n in ("up.0.weight", "down.0.weight") for n in names)  # only derived ones are held
    assert targets(compiled(model, x, deft={"skip_up": False})) == [DOWN] * 2


class Shared(Feed):
    def forward(self, x):
        for _ in range(3):
            x = x + self.down[0](self.hidden(0, self.norm(x)))
        return x


@pytest.mark.parametrize("gated", [False, True])
def test_a_module_used_three_times_holds_its_weights_once(gated):
    model, x = build(Shared(gated=gated))
    done = compiled(model, x)
    assert len(targets(done)) == 3
    (session,) = done.sessions
    packed = [w.fqn for w in session.program.weights.values() if w.source]
    assert len(packed) == len(set(packed)) == (2 if not gated else 2 + 1) - (not gated)
    torch.testing.assert_close(done(x), model(x))


class Peeking(Feed):
    def forward(self, x):
        h = self.hidden(0, self.norm(x))
        return x + self.down[0](h), h


@pytest.mark.parametrize("gated", [False, True])
def test_hidden_values_that_others_read_are_kept(gated):
    model, x = build(Peeking(gated=gated))
    done = compiled(model, x)
    assert targets(done) == [DOWN]
    for ours, theirs in zip(done(x), model(x)):
        torch.testing.assert_close(ours, theirs)
    if gated:
        assert "Something beside the MLP" in " ".join(done.report["deft"].notes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(act=F.gelu), "gelu, which is never zero"),
        (dict(act=F.silu, gated=True), "silu, which is never zero"),
        (dict(act=torch.tanh), None),
        (dict(act=F.leaky_relu), None),
        (dict(act=lambda x: F.relu(x) + 1), None),
        (dict(act=lambda x: F.relu(x).cumsum(-1)), None),
        (dict(act=torch.sigmoid, gated=True), "sigmoid, which is never zero"),
    ],
    ids=["gelu", "silu", "tanh", "leaky", "relu + 1", "relu, then a sum", "sigmoid gate"],
)
def test_what_is_never_off_is_left_alone(options, reason):
    model, x = build(Feed(**options))
    torch._dynamo.reset()
    found = thresher.explain(model, (x,), deft=ALL)
    account = found.report["deft"]
    assert not account.rewritten
    assert found.before[0].text() == found.after[0].text()
    if reason is not None:
        assert all(reason in m.reason for m in account.missed) and len(account.missed) == 2


NOT_ALONE = ("llava", "qwen2_vl")  # torch.export cannot take them
IN_DETAIL = ("llama", "bert", "opt", "gpt2", "modernbert", "mpt")


@pytest.mark.parametrize(
    "name",
    [
        n if n in IN_DETAIL else pytest.param(n, marks=pytest.mark.thorough)
        for n in sorted(zoo.ZOO)
        if n not in NOT_ALONE
    ],
)
def test_no_false_rewrite_in_the_zoo(name):
    from thresher.passes.pipeline import Pipeline
    from thresher.recipe import Recipe

    program = captures.of_zoo(name)
    after, report = Pipeline(Recipe.of(deft={**ALL, "bmax": 4096})).run(program)
    rewritten = [n for n in after.graph.nodes if n.target in (DOWN, MLP)]
    entry = zoo.ZOO[name]
    assert len(rewritten) == (entry.mlp if entry.activation in ("relu", "relu2") else 0)
    if not rewritten:
        assert len(report["deft"].missed) >= entry.mlp and not report["deft"].rewritten


def test_the_reasons_name_the_number_that_decided():
    model, x = build(Feed())
    reasons = []
    for given, options in ((x, {"min_bytes": 1 << 20}), (torch.randn(1, 70, 32), {}), (x.double(), {})):
        torch._dynamo.reset()
        found = thresher.explain(model.to(given.dtype), (given,), deft={**ALL, **options})
        reasons.append(found.report["deft"].missed[0].reason)
    assert "12,288 bytes, below min_bytes = 1,048,576" in reasons[0]
    assert "70 tokens a call" in reasons[1] and "bmax = 64" in reasons[1]
    assert "torch.float64" in reasons[2]


@pytest.mark.parametrize(("gated", "where"), [(False, "down"), (True, "up"), (True, "down")])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused(gated, where, bad):
    model, x = build(Feed(gated=gated))
    with torch.no_grad():
        weight = getattr(model, where)[0].weight
        weight[5 if where == "up" else 0, 5 if where == "down" else 0] = bad
    torch._dynamo.reset()
    found = thresher.explain(model, (x,), deft=ALL).report["deft"]
    if where == "down":
        (missed,) = found.missed
        assert "down.0.weight is not finite for neuron 5" in missed.reason and len(found.rewritten) == 1
    else:  # the up projection stays dense, so that its NaN reaches the output as before
        assert "up.0.weight is not finite for neuron 5" in " ".join(found.notes)


def test_lora_beside_the_down_projection_stays_dense():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = bert_relu()
    zoo.spread(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["output.dense"], init_lora_weights=False)
    ).eval()
    batch = zoo.tokens()
    done = compiled(wrapped, batch)
    assert targets(done) == [DOWN] * 2
    assert any("lora_A" in m.site and "stays dense" in m.reason for m in done.report["deft"].missed)
    with torch.no_grad():
        torch.testing.assert_close(done(**batch)[0], wrapped(**batch)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 2.0}, "tau"),
        ({"error": 0.0}, "error"),
        ({"bmax": 0}, "bmax"),
        ({"taus": 1}, "Did you mean 'tau'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ArgumentError, match=said):
        thresher.Recipe.of(deft=options)
