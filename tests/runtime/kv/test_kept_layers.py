"""Which layers a mixed-precision cache keeps whole or refuses, and policies that make no sense."""

import pytest
from transformers import LlamaConfig

from thresher.errors import ArgumentError
from thresher.runtime.kv.cache import MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy


@pytest.mark.parametrize(
    "change, argument",
    [
        (dict(important=0.0), "important"),
        (dict(important=1.5), "important"),
        (dict(bits=(4, 3)), "bits"),
        (dict(bits=None), "bits"),
        (dict(block=0), "block"),
    ],
)
def test_policies_that_make_no_sense_are_named(change, argument):
    with pytest.raises(ArgumentError) as error:
        KVPolicy(**change)
    assert error.value.argument == argument


def test_windowed_layers_are_kept_whole_and_recurrent_ones_as_they_are():
    from transformers import Qwen2Config

    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert len(MixedPrecisionCache(config).own) == 2
    config.layer_types = ["linear_attention", "full_attention"]
    cache = MixedPrecisionCache(config)
    assert [type(layer).__name__ for layer in cache.layers] == ["LinearAttentionLayer", "KVLayer"]
    assert cache.get_seq_length() == 0 and cache.lengths == [0]


def test_layers_whose_past_is_more_than_keys_and_values_are_refused():
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(ArgumentError, match="layer 1 of type 'indexed_attention'"):
        MixedPrecisionCache(config)
