"""DeepSeek's attention, whose keys are written slice by slice into a fresh tensor, packs like any other."""

import torch
import transformers as hf

import thresher


def test_latent_attention_is_packed():
    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    latent = dict(kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    config = hf.DeepseekV3Config(
        **sizes, **latent, num_key_value_heads=2, first_k_dense_replace=1, pad_token_id=0
    )
    model = hf.DeepseekV3ForCausalLM(config).eval()
    real = torch.arange(9) < torch.tensor((9, 4, 2))[:, None]
    given = {
        "input_ids": torch.randint(4, 60, (3, 9)) * real,
        "attention_mask": real.long(),
        "use_cache": False,
    }
    fast = thresher.compile(model, given, {"prepack": True}, target="reference")
    assert fast.report["prepack"].rewritten
    with torch.no_grad():
        torch.testing.assert_close(
            fast(**given).logits[real], model(**given).logits[real], rtol=1e-4, atol=1e-5
        )
