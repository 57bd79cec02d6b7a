"""The sparse MLP rewrite: which sites it finds, which it must leave alone, and what it does to the numbers."""

import captures
import pytest
import torch
import transformers as hf
import zoo
from torch import nn
from torch.nn import functional as F

import thresher
from thresher import site_counts
from thresher.errors import ArgumentError, ThresherError
from thresher.kernels import catalog, native
from thresher.passes import catalog as passes

catalog.load()
passes.load()
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="needs a C++ compiler")
ALL = {"min_bytes": 0}
DOWN, MLP = torch.ops.thresher.sparse_down.default, torch.ops.thresher.sparse_mlp.default


class Feed(nn.Module):
    """Two MLPs with a residual and a head; `act`, `gated`, `fused` and biases as asked."""

    def __init__(self, act=F.relu, gated=False, fused=False, bias=True, width=32, neurons=96, up_act=None):
        super().__init__()
        self.act, self.gated, self.fused, self.up_act = act, gated, fused, up_act
        self.norm = nn.LayerNorm(width)
        make = 2 * neurons if fused else neurons
        self.up = nn.ModuleList(nn.Linear(width, make, bias=bias) for _ in range(2))
        self.gate = nn.ModuleList(
            nn.Linear(width, neurons, bias=bias) for _ in range(2 if gated and not fused else 0)
        )
        self.down = nn.ModuleList(nn.Linear(neurons, width, bias=bias) for _ in range(2))

    def hidden(self, i, x):
        if not self.gated:
            return self.act(self.up[i](x))
        gate, up = self.up[i](x).chunk(2, -1) if self.fused else (self.gate[i](x), self.up[i](x))
        return self.act(gate) * (self.up_act(up) if self.up_act else up)

    def forward(self, x):
        for i in range(2):
            x = x + self.down[i](self.hidden(i, self.norm(x)))
        return x


def build(model, tokens=3, width=32):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval(), torch.randn(1, tokens, width)


def compiled(model, x, **options):
    torch._dynamo.reset()
    inputs = x if isinstance(x, dict) else (x,)
    return thresher.compile(
        model, inputs, deft={**ALL, **options.pop("deft", {})}, target="reference", **options
    )


def targets(done):
    (session,) = done.sessions
    return [n.target for n in session.program.graph.nodes if n.target in (DOWN, MLP)]


def roberta(act):
    return hf.RobertaModel(hf.RobertaConfig(**zoo._ENCODER, **zoo._WIDTH, hidden_act=act))


def t5(form):
    sizes = dict(vocab_size=96, pad_token_id=0, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, feed_forward_proj=form, decoder_start_token_id=0, use_cache=False)
    )


def t5_inputs():
    return {**zoo.tokens(), "decoder_input_ids": zoo.tokens()["input_ids"][:, :5]}


def gpt2_relu():
    sizes = dict(n_embd=32, n_inner=48, n_head=4, n_layer=2, n_positions=64)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**zoo._TOKENS, **sizes, activation_function="relu"))


def phi3_relu():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**zoo._DECODER, num_key_value_heads=2, hidden_act="relu"))


def bert_relu():
    return hf.BertModel(hf.BertConfig(**zoo._ENCODER, **zoo._WIDTH, hidden_act="relu"))


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


@needs_native
@pytest.mark.parametrize("gated", [False, True])
def test_nan_and_inf_activations_propagate(gated):
    model, x = build(Feed(gated=gated))
    done = compiled(model, x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        given = x.clone()
        given[0, 1, 3] = bad
        expected, found = model(given), done(given)
        assert not expected[0, 1].isfinite().any()
        assert torch.equal(expected.isfinite(), found.isfinite())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "how", ["in place", "new storage", "load_state_dict", "assigned", "another parameter"]
)
def test_weights_updated_after_compiling_are_repacked(gated, how):
    model, x = build(Feed(gated=gated))
    done = compiled(model, x)
    other = {k: 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()}
    with torch.no_grad():
        if how == "in place":
            for p in model.parameters():
                p.mul_(1.5)
        elif how == "new storage":
            for p in model.parameters():
                p.data = p.data * 1.5
        elif how == "load_state_dict":
            model.load_state_dict(other)
        elif how == "assigned":
            model.load_state_dict({k: v for k, v in other.items()}, assign=True)
        else:
            model.down[0].weight = nn.Parameter(torch.randn_like(model.down[0].weight))
    torch.testing.assert_close(done(x), model(x))


def test_a_weight_that_turns_infinite_after_compiling_is_an_error():
    model, x = build(Feed())
    done = compiled(model, x)
    with torch.no_grad():
        model.down[0].weight[0, 5] = float("inf")
    with pytest.raises(ThresherError, match=r"down\.0\.weight changed .* not finite for neuron 5"):
        done(x)


def test_a_conv1d_and_a_strided_weight_are_not_copied():
    model, x = build(Feed())
    with torch.no_grad():
        for down in model.down:
            down.weight = nn.Parameter(down.weight.t().contiguous().t())
    done = compiled(model, x)
    (session,) = done.sessions
    packed = [w for w in session.program.weights.values() if w.fqn.endswith("neuron_major")]
    assert {w.tensor.data_ptr() for w in packed} == {d.weight.data_ptr() for d in model.down}
    torch.testing.assert_close(done(x), model(x))


def test_training_is_not_rewritten():
    model, x = build(Feed())
    with pytest.raises(ArgumentError, match="training mode"):
        compiled(model.train(), x)


def test_dynamic_sizes():
    model, _ = build(Feed())
    torch._dynamo.reset()
    done = torch.compile(
        model, backend="thresher", dynamic=True, options={"deft": ALL, "target": "reference"}
    )
    with torch.no_grad():
        for shape in ((2, 3, 32), (5, 7, 32), (9, 20, 32)):
            given = torch.randn(shape)
            torch.testing.assert_close(done(given), model(given))


def test_calls_are_counted_by_site_and_stand_in_the_report():
    model, x = build(Feed())
    site_counts.reset()
    done = compiled(model, x)
    before = done.report["deft"].activity
    for _ in range(4):
        done(x)
    after = done.report["deft"].activity
    assert set(after) == set(done.report["deft"].rewritten) and len(after) == 2
    if native.unavailable() is None:
        for site, found in after.items():
            calls = found["sparse"] + found["dense"]
            assert calls - before[site]["sparse"] - before[site]["dense"] == 4
    assert "activity" in done.report.to_dict()["passes"][0]


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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_low_bit_weights_stay_within_the_budget_and_follow_the_model(bits, gated):
    model, x = build(Feed(gated=gated, width=64, neurons=256), tokens=2, width=64)
    done = compiled(model, x, deft={"bits": bits, "budget": 0.3})
    assert targets(done) == [DOWN] * 2
    (session,) = done.sessions
    held = {w.fqn: w.tensor for w in session.program.weights.values()}
    assert held[f"down.0.weight.codes{bits}"].shape == (256, 64 if bits == 8 else 32)
    error = 0.02 if bits == 8 else 0.25
    for _ in range(2):
        expected = model(x)
        assert (done(x) - expected).norm() <= error * expected.norm()
        with torch.no_grad():
            model.down[0].weight.mul_(-1.5)


def calibrated(model, batches, tmp_path, **options):
    torch._dynamo.reset()
    stats = thresher.calibrate(model, batches, deft={**ALL, "approximate": True})
    stats.save(tmp_path / "stats.safetensors")
    return compiled(
        model, batches[0], deft={"approximate": True, **options}, stats=str(tmp_path / "stats.safetensors")
    )


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.thorough)])
def test_approximate_mode_keeps_its_error_budget(name, tmp_path):
    model, batch = zoo.ZOO[name].build()
    done = calibrated(model, [batch], tmp_path, error=0.1, budget=0.5, bmax=64)
    account = done.report["deft"]
    assert targets(done) == [DOWN] * 2 and 0 < account.error <= 0.5
    (note,) = [n for n in account.notes if "thresholds keep" in n]
    assert float(note.split("at an error of ")[1].split()[0]) <= 0.1
    (session,) = done.sessions
    limits = [w for w in session.program.weights.values() if w.fqn.endswith(".threshold")]
    for w in limits:  # t / ||W2 row||
        fqn = w.fqn.removesuffix(".weight.threshold")
        norms = model.get_submodule(fqn).weight.float().norm(dim=0)
        torch.testing.assert_close(w.tensor * norms, (w.tensor * norms)[:1].expand_as(norms))
    with torch.no_grad(), pytest.raises(thresher.ThresherError, match="Compile the model again"):
        model.get_submodule(fqn).weight.mul_(2)
        done(**batch)


def test_approximate_mode_without_calibration_says_so():
    model, batch = zoo.ZOO["bert"].build()
    torch._dynamo.reset()
    found = thresher.explain(model, batch, deft={**ALL, "approximate": True}).report["deft"]
    assert not found.rewritten and all("needs calibration" in m.reason for m in found.missed)


def test_thresholds_of_another_checkpoint_are_refused(tmp_path):
    model, batch = zoo.ZOO["bert"].build()
    calibrated(model, [batch], tmp_path, error=0.1, budget=0.5)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(1.1)
    with pytest.raises(ThresherError, match="measured on weights"):
        compiled(model, batch, deft={"approximate": True}, stats=str(tmp_path / "stats.safetensors"))


def test_the_greedy_choice_spends_where_a_byte_costs_least():
    from thresher.passes.deft.thresholds import KEPT, Curve, choose

    cheap = Curve(KEPT, KEPT, tuple(0.01 * (1 - k) for k in KEPT), 1000)
    dear = Curve(KEPT, KEPT, tuple(1 - k for k in KEPT), 1000)
    chosen = choose({"cheap": cheap, "dear": dear}, 0.05)
    assert chosen["cheap"].density == KEPT[-1] and chosen["dear"].density > 0.8
    large = Curve(KEPT, KEPT, dear.errors, 100_000)
    chosen = choose({"large": large, "small": dear}, 0.3)
    assert chosen["large"].density < chosen["small"].density
