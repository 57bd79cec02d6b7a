"""The mixed-precision cache under Hugging Face's own generation, and what it holds."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from thresher.errors import ArgumentError
from thresher.runtime.kv.cache import MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy

EIGHT = KVPolicy(bits=(8, 8), block=32)


def _model(seed=0, **overrides):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(LlamaConfig(**(sizes | overrides))).eval()
    model.set_attn_implementation("thresher_kv")
    return model


@pytest.fixture(scope="module")
def model():
    return _model()


def _prompt(batch, length, seed=0):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def _generate(model, prompt, cache, new=24, **kwargs):
    return model.generate(prompt, past_key_values=cache, max_new_tokens=new, do_sample=False, **kwargs)


def _logits(model, prompt, cache, **kwargs):
    with torch.no_grad():
        return model(prompt, past_key_values=cache, **kwargs).logits


def _error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("length", [5, 31, 32, 33, 100])
def test_every_token_generated_at_eight_bits_is_the_dense_choice(model, length):
    """Up to ties: a random model's best two tokens may be closer than eight bits tell apart."""
    cache = MixedPrecisionCache(model.config, EIGHT)
    text = _generate(model, _prompt(2, length), cache, new=60)
    assert cache.lengths == [length + 59] * 3 and cache.get_seq_length() == length + 59
    dense = _logits(model, text[:, :-1], None)[:, length - 1 :]
    short = dense.amax(-1) - dense.gather(-1, text[:, length:, None])[..., 0]
    assert short.max() < 0.02 * dense.std(), short.max()


def test_error_falls_with_bits(model):
    prompt = _prompt(2, 200)
    more = _prompt(2, 20, seed=1)
    dense = DynamicCache(config=model.config)
    _logits(model, prompt, dense)
    expected = _logits(model, more, dense)
    errors = []
    for bits in ((8, 8), (4, 4), (4, 2), (2, 2)):
        cache = MixedPrecisionCache(model.config, KVPolicy(bits=bits))
        _logits(model, prompt, cache)
        errors.append(_error(_logits(model, more, cache), expected))
    assert errors == sorted(errors)
    assert errors[0] < 2e-3 and errors[2] < 0.2, errors


def test_important_tokens_are_worth_more_bits_than_others():
    """Attention follows the keys' direction; tokens the probes attend to must get the better pool."""
    model = _model(seed=3, num_hidden_layers=1)
    cache = MixedPrecisionCache(model.config, KVPolicy(important=0.25, block=64))
    layer = cache.layers[0]
    make = torch.Generator().manual_seed(0)
    keys, values = (0.1 * torch.randn(1, 2, 100, 32, generator=make) for _ in range(2))
    q = 0.1 * torch.randn(1, 4, 100, 32, generator=make) + 1.0
    keys[:, :, 10:30] += 1.0  # what every query looks for
    layer.extend(keys, values)
    layer.attend(q, 0.18)
    assert [pool.slots for pool in layer.pools] == [25, 75] and [pool.bits for pool in layer.pools] == [4, 2]
    assert torch.isin(torch.arange(10, 30), layer.places[0][:, 0]).all()


def test_second_turn_of_several_tokens_is_right_aligned(model):
    prompt, more = _prompt(2, 70), _prompt(2, 9, seed=1)
    expected = _logits(model, torch.cat([prompt, more], 1), DynamicCache(config=model.config))[:, 70:]
    cache = MixedPrecisionCache(model.config, EIGHT)
    _logits(model, prompt, cache)
    assert _error(_logits(model, more, cache), expected) < 5e-3


def test_long_second_turn(model):
    prompt, more = _prompt(1, 70), _prompt(1, 90, seed=1)
    expected = _logits(model, torch.cat([prompt, more], 1), DynamicCache(config=model.config))[:, 70:]
    cache = MixedPrecisionCache(model.config, EIGHT)
    _logits(model, prompt, cache)
    assert _error(_logits(model, more, cache), expected) < 5e-3
    assert sum(pool.slots for pool in cache.layers[0].pools) == 160, "the second turn was compressed too"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_gets_restored_keys(model, implementation):
    prompt = _prompt(2, 60)
    more = _prompt(2, 5, seed=1)
    expected = _logits(model, torch.cat([prompt, more], 1), None)[:, 60:]
    try:
        model.set_attn_implementation(implementation)
        cache = MixedPrecisionCache(model.config, EIGHT)
        _logits(model, prompt, cache)
        assert _error(_logits(model, more, cache), expected) < 5e-3
        assert [pool.slots > 0 for pool in cache.layers[0].pools] == [True, False]
        with pytest.raises(ArgumentError, match="thresher_kv"):
            _logits(model, prompt, MixedPrecisionCache(model.config, KVPolicy(drop=True)))
    finally:
        model.set_attn_implementation("thresher_kv")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    """A padded row gives what it gives alone, with the pads in the quantized pools."""
    short, long = _prompt(1, 50, seed=1), _prompt(1, 80, seed=2)
    pad = torch.zeros(1, 30, dtype=torch.int64)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[0, slice(0, 30) if side == "left" else slice(50, 80)] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = MixedPrecisionCache(model.config, KVPolicy(bits=(8, 8), block=64))
    first = _logits(model, torch.cat([row, long]), cache, attention_mask=mask, position_ids=positions)
    more = _prompt(2, 3, seed=3)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    second = _logits(model, more, cache, attention_mask=mask, position_ids=mask.cumsum(1)[:, -3:] - 1)
    alone = MixedPrecisionCache(model.config, KVPolicy(bits=(8, 8), block=64))
    expected = _logits(model, short, alone)
    assert _error(first[:1, mask[0, :80].bool()], expected) < 1e-5
    assert _error(second[:1], _logits(model, more[:1], alone)) < 5e-3


def test_dropped_tokens_leave_and_positions_go_on(model):
    cache = MixedPrecisionCache(model.config, KVPolicy(important=0.5, drop=True))
    _generate(model, _prompt(2, 140), cache, new=5)
    assert cache.lengths == [70 + 4] * 3
    assert cache.get_seq_length() == 144
    assert cache.layers[0].positions[:, -1].tolist() == [143, 143]


def test_dropping_without_rounding_attends_to_exactly_the_kept(model):
    policy = KVPolicy(important=0.5, bits=None, drop=True, block=64)
    cache = MixedPrecisionCache(model.config, policy)
    _logits(model, _prompt(1, 100), cache)
    layer = cache.layers[0]
    assert layer.slots == 50 and not layer.pools
    positions = layer.positions[0]
    assert torch.equal(positions, positions.sort().values)
    q = torch.randn(1, 4, 1, 32)
    keys, values = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32)
    kept = [torch.cat(pair, 2) for pair in ((layer.keys, keys), (layer.values, values))]
    layer.extend(keys, values)
    expected = torch.nn.functional.scaled_dot_product_attention(q, *kept, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(layer.attend(q, 0.2), expected)


def test_adaptive_share_follows_tau(model):
    shares = []
    for tau in (0.5, 0.9, 0.99):
        cache = MixedPrecisionCache(model.config, KVPolicy(important=None, tau=tau))
        _logits(model, _prompt(1, 200), cache)
        shares.append(cache.layers[0].pools[0].slots)
    assert 0 < shares[0] < shares[1] < shares[2] <= 200


def test_filled_from_a_pruned_prefill():
    """Layers of different lengths, with unused slots, as a compiled prefill hands them over."""
    model = _model(num_hidden_layers=2)
    prompt, more = _prompt(1, 60), _prompt(1, 4, seed=1)
    dense = DynamicCache(config=model.config)
    _logits(model, prompt, dense)
    kept = torch.tensor([[0, 5, 7, 20, 41, 59, -1, -1]])
    cache = MixedPrecisionCache(model.config, EIGHT)
    for index, chosen in enumerate((torch.arange(60)[None], kept)):
        at = chosen.clamp_min(0)[0]
        layer = dense.layers[index]
        cache.fill(index, layer.keys[:, :, at], layer.values[:, :, at], chosen, seen=60)
        layer.keys, layer.values = (t[:, :, chosen[0][chosen[0] >= 0]] for t in (layer.keys, layer.values))
    assert cache.lengths == [60, 8] and [layer.get_seq_length() for layer in cache.layers] == [60, 60]
    actual = _logits(model, more, cache)
    hidden = model.model.embed_tokens(more)
    rotary = model.model.rotary_emb(hidden, torch.arange(60, 64)[None])
    for index, block in enumerate(model.model.layers):  # the same by hand, on exact keys and values
        past = dense.layers[index].keys.shape[2]
        mask = torch.ones(4, past + 4, dtype=torch.bool).tril(past)[None, None]
        model.set_attn_implementation("sdpa")
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=dense)
    expected = model.lm_head(model.model.norm(hidden))
    assert _error(actual, expected) < 5e-3


def test_memory_at_thirty_percent_important():
    model = _model(num_hidden_layers=1, max_position_embeddings=5000, hidden_size=256).bfloat16()
    cache, dense = MixedPrecisionCache(model.config), DynamicCache(config=model.config)
    prompt = _prompt(1, 4096)
    for each in (cache, dense):
        _logits(model, prompt, each)
    full = 2 * dense.layers[0].keys.numel() * 2
    assert cache.bytes <= 0.25 * full, (cache.bytes, full)


def test_beams_and_batch_changes(model):
    prompt = _prompt(2, 40)
    text = _generate(
        model, prompt, MixedPrecisionCache(model.config, KVPolicy(block=64)), num_beams=3, new=12
    )
    assert torch.equal(text, _generate(model, prompt, DynamicCache(config=model.config), num_beams=3, new=12))
    cache = MixedPrecisionCache(model.config, EIGHT)
    _logits(model, prompt, cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2]))
    alone = MixedPrecisionCache(model.config, EIGHT)
    _logits(model, prompt[1:], alone)
    more = _prompt(1, 3, seed=1)
    assert _error(_logits(model, more, cache), _logits(model, more, alone)) < 1e-5


def test_crop_within_the_tail(model):
    prompt, more = _prompt(1, 20), _prompt(1, 6, seed=1)
    cache = MixedPrecisionCache(model.config, EIGHT)
    _logits(model, prompt, cache)
    first = _logits(model, more, cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 20
    assert torch.equal(_logits(model, more, cache), first)
    _logits(model, _prompt(1, 32), cache)  # compresses all
    with pytest.raises(ArgumentError, match="compressed"):
        cache.crop(-1)
    assert not cache.is_croppable


def test_reset_starts_anew(model):
    cache = MixedPrecisionCache(model.config, EIGHT)
    first = _logits(model, _prompt(1, 40), cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.bytes == 0
    assert torch.equal(_logits(model, _prompt(1, 40), cache), first)


def test_the_attention_works_without_the_cache(model):
    prompt = _prompt(2, 30)
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    actual = _logits(model, prompt, None, attention_mask=mask)
    try:
        model.set_attn_implementation("sdpa")
        expected = _logits(model, prompt, None, attention_mask=mask)
    finally:
        model.set_attn_implementation("thresher_kv")
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_a_cache_that_keeps_all_goes_back_beyond_its_prompt():
    """Where rows kept different tokens of the stretch that goes, their places hold none any more."""
    model = _model(num_hidden_layers=1)
    cache = MixedPrecisionCache(model.config, KVPolicy(bits=None, important=1.0, drop=True))
    keys = torch.randn(2, 2, 4, 32)
    cache.fill(0, keys, keys, torch.tensor([[0, 1, 2, 5], [0, 3, 4, 5]]), seen=6)
    cache.crop(-1)
    assert cache.layers[0].positions.tolist() == [[0, 1, 2], [0, 3, 4]] and cache.get_seq_length() == 5
    cache.crop(-2)
    assert cache.layers[0].positions.tolist() == [[0, 1, 2], [0, -1, -1]] and cache.get_seq_length() == 3
