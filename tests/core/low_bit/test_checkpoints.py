"""Quantized models as files: written once, and the same logits in transformers, by our operators and compiled."""

import copy
import functools
import json
import subprocess
import sys

import pytest
import tiny_directories
import torch
from sampled import sampled
from transformers import AutoModelForCausalLM, AutoTokenizer

import thresher
from thresher.errors import ArgumentError
from thresher.integrations.transformers import ThresherConfig, from_pretrained
from thresher.low_bit.linear import LowBitLinear, NVFP4Linear

OF_8_BITS = 0.03  # of the largest logit, measured 0.012 to 0.017; a rotation that is wrong changes all of it
IDS = (torch.arange(4 * 32).reshape(4, 32) * 7) % 60 + 3
KINDS = {
    "2 bits": {"bits": 2},
    "3 bits in groups": {"bits": 3, "group_size": 32},
    "4 bits, zero points": {"bits": 4, "group_size": 32, "symmetric": False},
    "8 bits": {"bits": 8},
    "NVFP4": {"grid": "nvfp4"},
}

ZEROS = {"4 bits, zero points"}  # which transformers' loader cannot read, whoever wrote them
DTYPES = {"NVFP4": torch.bfloat16}  # which compressed-tensors decompresses it to, whatever the model is


def model_of(dtype=torch.float32, **given):
    torch.manual_seed(0)
    model = tiny_directories.llama(**{"initializer_range": 0.2, "num_hidden_layers": 1, **given}).eval()
    rotary = copy.deepcopy(model.model.rotary_emb)
    model.to(dtype).model.rotary_emb = rotary  # as transformers loads one: its frequencies stay in fp32
    return model


def logits(model, ids=IDS[:2, :12]):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def close(a, b, share):
    return float((a - b).abs().max() / b.abs().max()) <= share


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By kind: the quantized model in memory, and its directory. Made when first asked for."""

    @functools.cache
    def saved(name):
        low = thresher.quantize(
            model_of(DTYPES.get(name, torch.float32)), IDS,
            thresher.RSQ(rotate_down=False, rotate_inputs=False, **KINDS[name]),
            portable=name not in ZEROS, tokenizer=tiny_directories.tokenizer(),
        )  # fmt: skip
        return low, low.save_pretrained(tmp_path_factory.mktemp("low"))

    return saved


@pytest.mark.parametrize("name", sampled(["2 bits", "4 bits, zero points", "8 bits", "NVFP4"], list(KINDS)))
def test_plain_transformers_our_operators_and_the_model_in_memory_agree(saved, name):
    pytest.importorskip("compressed_tensors", reason="plain transformers reads the files by it")
    low, folder = saved(name)
    memory = low.as_model()
    ours = from_pretrained(folder)
    kind = NVFP4Linear if name == "NVFP4" else LowBitLinear
    assert sum(isinstance(m, kind) for m in ours.modules()) == 7
    expected = logits(memory)
    assert torch.equal(logits(ours), expected)
    if name not in ZEROS:
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert not any(isinstance(m, (LowBitLinear, NVFP4Linear)) for m in plain.modules())
        # compressed-tensors rounds a bf16 model's tensor scales and weights to bf16: 0.3 % of a weight, 2 % of a logit here
        rounding = 3e-2 if name in DTYPES else 1e-5
        assert close(logits(plain), expected, rounding)
    assert AutoTokenizer.from_pretrained(folder)("the mill")["input_ids"] == [3, 27, 1]


def test_a_cast_leaves_the_scales_of_nvfp4_their_types(saved):
    model = saved("NVFP4")[0].as_model()
    linear = model.float().model.layers[0].mlp.up_proj
    assert (
        linear.weight_scale.dtype == torch.float8_e4m3fn and linear.weight_global_scale.dtype == torch.float32
    )
    assert model.dtype == torch.float32 and logits(model).isfinite().all()


def test_at_8_bits_it_is_nearly_the_model_so_that_the_rotations_are_right(saved):
    low, _ = saved("8 bits")
    assert close(logits(low.as_model()), logits(model_of()), OF_8_BITS)
    assert low.config.rotate and low.config.rotate_heads and not low.config.rotate_down


def test_the_compiled_codes_are_the_saved_model(saved):
    """What `thresher.compile(model, **low.options)` computes is what the directory holds."""
    low, _ = saved("4 bits, zero points")
    batch = {"input_ids": IDS[:2, :12]}
    compiled = thresher.compile(model_of(use_cache=False), batch, **low.options, target="reference")
    assert close(compiled(**batch).logits, logits(low.as_model()), 1e-5)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_tied_head_gets_its_own_table_where_the_stream_is_rotated(tmp_path, tied):
    model = model_of(tie_word_embeddings=tied)
    low = thresher.quantize(model, IDS, thresher.RSQ(bits=8), portable=True)
    loaded = from_pretrained(low.save_pretrained(tmp_path))
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert close(logits(loaded), logits(model), OF_8_BITS)
    assert model.config.tie_word_embeddings == tied and not hasattr(model.config, "quantization_config")


def test_bf16_models_are_saved_in_bf16(tmp_path):
    low = thresher.quantize(model_of(torch.bfloat16), IDS, thresher.RSQ(bits=4), portable=True)
    loaded = from_pretrained(low.save_pretrained(tmp_path), dtype=torch.bfloat16)
    linear = loaded.model.layers[0].mlp.up_proj
    assert linear.weight_scale.dtype == torch.bfloat16 == loaded.dtype
    assert torch.equal(logits(loaded), logits(low.as_model()))


def test_what_cannot_be_fused_is_refused_and_left_out_when_asked(tmp_path):
    low = thresher.quantize(model_of(), IDS, thresher.RSQ(bits=8))
    with pytest.raises(ArgumentError, match="rotate_down=False"):
        low.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    left = thresher.quantize(model_of(), IDS, thresher.RSQ(bits=8, symmetric=False), portable=True)
    assert left.config.symmetric and not left.config.rotate_down
    assert [n for n in left.report.notes if "online" in n] and [
        n for n in left.report.notes if "zero points" in n
    ]


def test_layer_norms_are_not_rotated_in_files(tmp_path):
    import transformers as hf

    torch.manual_seed(0)
    model = hf.OPTForCausalLM(hf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1,
                                           num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
                                           word_embed_proj_dim=32)).eval()  # fmt: skip
    low = thresher.quantize(model, IDS, thresher.RSQ(bits=8), portable=True)
    assert not low.config.rotate and any("layer norms" in n for n in low.report.notes)
    assert close(logits(from_pretrained(low.save_pretrained(tmp_path))), logits(model), OF_8_BITS)
    whole = thresher.quantize(model, IDS, thresher.RSQ(bits=8, rotate_down=False, rotate_inputs=False))
    with pytest.raises(ArgumentError, match="layer norms"):
        whole.as_model()


def test_a_config_quantizes_while_transformers_loads(tmp_path):
    source = tiny_directories.save(model_of(), tmp_path / "source")
    plain = AutoModelForCausalLM.from_pretrained(source)
    chosen = ThresherConfig(IDS, bits=8, length=32)
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=chosen)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, LowBitLinear)
    assert close(logits(loaded), logits(plain), OF_8_BITS)
    loaded.save_pretrained(tmp_path / "low")
    stated = json.loads((tmp_path / "low" / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "compressed-tensors" and stated["format"] == "pack-quantized"
    assert torch.equal(logits(from_pretrained(tmp_path / "low")), logits(loaded))
    by_text = ThresherConfig(tiny_directories.TEXTS * 4, bits=4, sequences=4, length=16)
    again = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=by_text
    )  # with the directory's tokenizer
    assert isinstance(again.model.layers[0].mlp.up_proj, LowBitLinear)


def test_wrong_words_are_said(tmp_path):
    with pytest.raises(ArgumentError, match="Did you mean 'bits'"):
        ThresherConfig(bit=4)
    with pytest.raises(ArgumentError, match="rsq option bits"):
        ThresherConfig(bits=5)
    source = tiny_directories.save(model_of(), tmp_path)
    with pytest.raises(ArgumentError, match="no quantization"):
        from_pretrained(source)


def test_a_loaded_model_generates_copies_and_is_compiled(saved):
    _, folder = saved("3 bits in groups")
    model = from_pretrained(folder)
    assert model.generate(IDS[:1, :5], max_new_tokens=3, do_sample=False).shape == (1, 8)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    batch = {
        "input_ids": IDS[:3, :9],
        "attention_mask": (torch.arange(9) < torch.tensor([[3], [9], [6]])).long(),
    }
    compiled = thresher.compile(model, batch, "exact", target="reference")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert close(compiled(**batch).logits[real], model(**batch).logits[real], 1e-5)


def test_the_hub_is_given_the_directory(saved, monkeypatch):
    import huggingface_hub as hub
    from huggingface_hub.utils import _http

    httpx = getattr(_http, "httpx2", None) or _http.httpx  # by its version; only this layer is not real
    asked, files = [], []

    def answer(request):
        asked.append((request.method, request.url.path))
        if request.url.path == "/api/repos/create":
            return httpx.Response(200, json={"url": "https://huggingface.co/me/low", "name": "me/low"})
        if request.url.path.endswith("/preupload/main"):
            given = json.loads(request.content)["files"]
            return httpx.Response(200, json={"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in given]})  # fmt: skip
        if request.url.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in request.content.splitlines()]
            files.extend(line["value"]["path"] for line in lines if line["key"] == "file")
            return httpx.Response(200, json={"commitUrl": "https://huggingface.co/me/low/commit/1", "commitOid": "1",
                                             "success": True})  # fmt: skip
        return httpx.Response(200, json={"sha": "1", "siblings": [], "id": "me/low"})

    hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    try:
        url = saved("2 bits")[0].push_to_hub("me/low", token="hf_not_a_real_one")
    finally:
        hub.close_session()
        hub.set_client_factory(lambda: httpx.Client(follow_redirects=True))
    assert url == "https://huggingface.co/me/low"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files), asked


def test_the_config_is_registered_by_its_import_alone():
    asked = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; "
        "import thresher.integrations.transformers; print('thresher' in m)"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
