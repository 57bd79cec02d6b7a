"""Every matrix of a model is rewritten or in a Miss, and coverage counts the bytes of those that products read."""

import pytest
import torch
import transformers as hf
from sampled import sampled

import thresher
from thresher.errors import CoverageError

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
             max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
GROUPED = dict(num_key_value_heads=1, head_dim=16, num_experts_per_tok=2)
MODELS = {
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **GROUPED, moe_intermediate_size=16,
                                                                  num_experts=4)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, **GROUPED, num_local_experts=4)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1,
                                                       pad_token_id=0)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=48,
                                                  word_embed_proj_dim=32)),
}  # fmt: skip


def batch():
    ids = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def covered(name, method="nvfp4", **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[name]().eval()
    recipe = {method: {"min_weights": 0, "keep": [], "budget": 99.0}, "min_gain": 0.0, **options}
    return model, thresher.compile(model, batch(), recipe, target="reference").report[method]


@pytest.mark.parametrize("name", sampled(["gpt_oss", "mamba", "opt"], list(MODELS)))
def test_every_matrix_is_rewritten_or_in_a_miss(name):
    model, account = covered(name)
    sites = [*account.rewritten, *(m.site for m in account.missed), *(m.site for m in account.apart)]
    assert len(sites) == len(set(sites))
    tied = {id(p): n for n, p in model.named_parameters()}
    walked = 0
    for fqn, tensor in model.named_parameters():
        if tensor.dim() < 2 or tied[id(tensor)] != fqn:
            continue
        walked += tensor.numel() * tensor.element_size()
        names = {fqn.removesuffix(".weight"), *(["lm_head"] if "embed" in fqn or "wte" in fqn else [])}
        assert names & set(sites), f"{fqn} {tuple(tensor.shape)} is nowhere in the report"
    apart = sum(
        p.numel() * 4
        for n, p in model.named_parameters()
        if n.removesuffix(".weight") in {m.site for m in account.apart}
    )
    assert sum(account.weights.values()) == walked - apart


def test_experts_that_were_not_touched_count():
    keep = {"nvfp4": {"min_weights": 0, "keep": ["*experts*"], "budget": 99.0}}
    model, account = covered("qwen3_moe", **keep)
    experts = {n: p.numel() * 4 for n, p in model.named_parameters() if "experts" in n and p.dim() == 3}
    assert {m.site for m in account.missed} == set(experts)
    assert account.weights["missed"] == sum(experts.values()) and 0 < account.coverage < 0.8
    assert all("4 matrices of" in m.reason and "keep='*experts*'" in m.reason for m in account.missed)
    with pytest.raises(CoverageError, match=r"coverage is .*4 matrices of"):
        covered("qwen3_moe", **keep, require={"nvfp4": 1.0})


def test_experts_are_rewritten():
    assert covered("qwen3_moe")[1].coverage == covered("gpt_oss")[1].coverage == 1.0


def test_tables_do_not_count_and_are_named():
    account = covered("bert")[1]
    assert account.coverage == 1.0 and not account.missed
    assert {m.site.rsplit(".", 1)[-1] for m in account.apart} == {
        "word_embeddings", "position_embeddings", "token_type_embeddings"
    }  # fmt: skip
    assert all("aten.embedding" in m.reason for m in account.apart)


def test_kernels_of_convolutions_and_products_from_the_left_are_misses():
    account = covered("mamba")[1]
    reasons = {m.site.rsplit(".", 1)[-1]: m.reason for m in account.missed}
    assert "aten.conv1d" in reasons["conv1d"] and "aten.matmul" in reasons["dt_proj"]
    assert set(reasons) == {"conv1d", "dt_proj"}
