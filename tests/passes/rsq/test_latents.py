"""Attention from latents (MLA): recovered, and rotated exactly through its norms, where nothing else reads or keeps them."""

import captures
import mixtures
import pytest
import torch
import transformers as hf

import thresher.backend
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.plan import make_plan
from thresher.passes.rsq.quantizer.sweep import exactness
from thresher.passes.rsq.rewrite import rotate
from thresher.passes.structure.recover import recover

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
             pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)  # fmt: skip
DENSE = ("minicpm3", "youtu", "deepseek_v3", "deepseek_v2", "no_q_latent")


def model(kind):
    torch.manual_seed(0)
    made = {
        "minicpm3": lambda: hf.MiniCPM3ForCausalLM(hf.MiniCPM3Config(**SIZES)),
        "youtu": lambda: hf.YoutuForCausalLM(hf.YoutuConfig(**SIZES)),
        "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(**SIZES, first_k_dense_replace=2)
        ),
        "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(
            hf.DeepseekV2Config(**SIZES, first_k_dense_replace=2, mlp_layer_types=["dense"] * 2)
        ),
        "no_q_latent": lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(**{**SIZES, "q_lora_rank": None}, first_k_dense_replace=2)
        ),
    }[kind]()
    with torch.no_grad():
        for p in made.parameters():  # norms too, so that one left unfused would show
            p.normal_(0, p.shape[-1] ** -0.5) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return made.eval().requires_grad_(False)


def given():
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def program():
    known = {}

    def of(kind):
        if kind not in known:
            known[kind] = captures.export(model(kind), given())
        return known[kind].copy()

    return of


@pytest.mark.parametrize("kind", DENSE)
def test_attention_from_latents_is_recovered(kind, program):
    traced = program(kind)
    structure = recover(traced)
    assert not structure.missed and [layer.complete for layer in structure.layers] == [True, True]
    for site in structure.attentions:
        assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (4, 4, 12, 8) and not site.cross
        assert site.rope is not None and (site.rope.start, site.rope.dim) == (8, 4)
        assert site.k_shared is not None and site.kv_latent is not None and site.past is None
        assert (site.q_latent is None) == (kind == "no_q_latent")
        down, shared = site.kv_latent.down, site.k_shared
        assert shared.linear is down and shared.rows.tolist() == [list(range(16, 20))]
        assert site.kv_latent.rows.tolist() == list(range(16))
        both = torch.cat([site.k.rows, site.v.rows], 1)  # of each head its keys, then its values
        assert torch.equal(both, torch.arange(64).view(4, 16)) and torch.equal(
            site.q.rows, torch.arange(48).view(4, 12)
        )
        names = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        names = ["q_proj", *names] if kind == "no_q_latent" else ["q_a_proj", "q_b_proj", *names]
        assert [linear.fqn.rpartition(".")[2] for linear in site.linears] == names


@pytest.mark.parametrize("kind", DENSE)
def test_rotation_through_latents_is_exact(kind, program):
    before = program(kind)
    after = before.copy()
    plan = make_plan(after, recover(after), RSQConfig(latents="all"))
    rotate(after, plan, lazy=True)
    after.clean()
    assert len(plan.streams) == 1 and len(plan.latents) == (2 if kind == "no_q_latent" else 4)
    assert not [m for m in plan.missed if "keep='head'" not in m.reason]
    assert exactness(before, after, list(given().values())) <= 1e-9
    assert "Latents: Hadamard matrix of order 16" in " ".join(plan.notes)


def test_what_a_cache_holds_is_rotated_only_where_asked_for(program):
    traced = program("youtu")
    plan = make_plan(traced, recover(traced), RSQConfig())
    assert len(plan.latents) == 2
    reasons = {m.site: m.reason for m in plan.missed}
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa (rotation of the latent that it makes)"
        assert "A cache holds it in the place of keys and values" in reasons[name]
    none = make_plan(traced, recover(traced), RSQConfig(latents="none"))
    assert not none.latents and not [m for m in none.missed if "latent" in m.site]
    assert RSQConfig.from_json('{"bits": 4}').latents == "none", "files from before there were such rotations"


def test_a_latent_that_leaves_the_graph_is_not_rotated_and_the_values_are():
    cached = model("youtu")
    programs = []

    def backend(module, example):
        programs.append(thresher.graph.capture.from_dynamo(module, example)[0])
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(cached, backend=backend)
        past = fast(**given()).past_key_values
        fast(input_ids=given()["input_ids"][:, :1], past_key_values=past)
    prompt, step = programs[0], programs[-1]
    plan = make_plan(prompt, recover(prompt), RSQConfig(latents="all"))
    reasons = [m.reason for m in plan.missed if "rotation of the latent" in m.site]
    assert len(plan.latents) == 2 and len(reasons) == 2
    assert all("leaves the graph, as a cache holds it" in r for r in reasons)
    values = [e for e in plan.edits.values() if e.site.role == "kv"]
    assert len(values) == 2 and all(e.heads_out is not None and not e.cached for e in values)
    (first, _) = recover(step).attentions
    assert first.past is not None and first.kv_latent is not None and first.kv_latent.past is first.past[0]
    plan = make_plan(step, recover(step), RSQConfig(latents="all"))
    reasons = [m.reason for m in plan.missed if "rotation of the latent" in m.site]
    assert len(reasons) == 2 and all("and not by linears alone" in r for r in reasons)


def test_the_attention_of_a_mixture_is_rotated_through_its_latents_too():
    mixed = mixtures.build("deepseek_v3").requires_grad_(False)
    traced = captures.export(mixed, {k: v for k, v in mixtures.batch().items() if k != "use_cache"})
    after = traced.copy()
    plan = make_plan(after, recover(after), RSQConfig(latents="all"))
    rotate(after, plan, lazy=True)
    after.clean()
    assert len(plan.latents) == 2 and not plan.streams
    inputs = [v for k, v in mixtures.batch().items() if k != "use_cache"]
    assert exactness(traced, after, inputs) <= 1e-9


def test_codes_serve_prompts_and_steps_with_a_compressed_cache():
    torch._dynamo.reset()
    plain = model("deepseek_v3")
    ids = torch.randint(4, 60, (12, 9), generator=torch.Generator().manual_seed(0))
    low = thresher.quantize(plain, ids, {"rsq": {"bits": 8}})
    assert len(low.report.linears) == 16
    with torch.no_grad(), thresher.sessions.collect() as built:
        fast = torch.compile(
            plain, backend="thresher", options={**low.options, "target": "reference"}, dynamic=True
        )
        ours, theirs = fast(ids[:2], use_cache=True), plain(ids[:2], use_cache=True)
        for got, want in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
            assert float((got.keys - want.keys).norm() / want.keys.norm()) < 0.05  # not rotated
        for token in (5, 6):
            step = torch.full((2, 1), token)
            ours, theirs = (
                fast(step, past_key_values=ours.past_key_values),
                plain(step, past_key_values=theirs.past_key_values),
            )
            assert float((ours.logits - theirs.logits).norm() / theirs.logits.norm()) < 0.05
    assert len(built) > 1 and all(len(s.report["rsq"].rewritten) == 16 for s in built)
