"""vLLM on a checkpoint of ours, by our operators: the tokens and log-probabilities of the model in memory."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from vllm_runs import IDS, run

import thresher

transformers = pytest.importorskip("transformers")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install 'thresher[vllm]'"
)
KINDS = {
    "4 bits": {"bits": 4, "group_size": 32},
    "3 bits": {"bits": 3, "group_size": 64},
    "2 bits": {"bits": 2},
    "8 bits": {"bits": 8, "group_size": 32},
    "NVFP4": {"grid": "nvfp4"},
}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                                      initializer_range=0.1, eos_token_id=None)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_computes_what_the_model_in_memory_does(small, kind, tmp_path):
    low = thresher.quantize(small, IDS, thresher.RSQ(**KINDS[kind]), portable=True)
    folder, model, prompts = low.save_pretrained(tmp_path / "low"), low.as_model(), IDS[:2, :12]
    with torch.no_grad():
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False
        )
        first = model(prompts).logits[:, -1].log_softmax(-1).max(-1).values
    for row, (found, logprob) in enumerate(run(folder, prompts.tolist(), tmp_path, quantization="thresher")):
        assert found == tokens[row, 12:].tolist()
        assert abs(logprob - float(first[row])) < 1e-3


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("how", ["tensor_parallel_size"])
def test_two_processes_share_a_model(small, how, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself vLLM wants a NUMA node for each
    config = thresher.RSQ(bits=4, group_size=32)
    low = thresher.quantize(small, IDS, config, portable=True)
    folder, model, prompts = low.save_pretrained(tmp_path / "low"), low.as_model(), IDS[:2, :12]
    with torch.no_grad():
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False
        )
    more = {how: 2, "distributed_executor_backend": "mp", "quantization": "thresher"}
    found = run(folder, prompts.tolist(), tmp_path, **more)
    assert [got for got, _ in found] == tokens[:, 12:].tolist()


@pytest.mark.slow
@needs_vllm
def test_deft_leaves_out_the_neurons_that_are_zero(tmp_path):
    torch.manual_seed(0)
    config = transformers.OPTConfig(vocab_size=512, hidden_size=256, ffn_dim=4096, num_hidden_layers=2,
                                    num_attention_heads=4, word_embed_proj_dim=256, init_std=0.1,
                                    eos_token_id=None)  # fmt: skip
    model, prompts = transformers.OPTForCausalLM(config).eval(), IDS[:2, :12]
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias.sub_(3.0)  # few neurons are not zero
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False
        )
    model.save_pretrained(tmp_path / "opt")
    count = """
    from thresher import site_counts
    sites = [site_counts.site(f"model.decoder.layers.{i}.fc2") for i in range(2)]
    with open(folder + ".sites", "w") as file:
        json.dump([[s.sparse, s.union_density] for s in sites], file)
"""
    found = run(tmp_path / "opt", prompts.tolist(), tmp_path, count, quantization="thresher-deft")
    assert [got for got, _ in found] == tokens[:, 12:].tolist()
    for sparse, density in json.loads((tmp_path / "opt.sites").read_text()):
        assert sparse >= 5 and density < 0.3  # the steps behind the prefill


@pytest.mark.slow
@needs_vllm
def test_deft_refuses_a_model_whose_neurons_are_never_zero(small, tmp_path):
    small.save_pretrained(tmp_path / "llama")
    with pytest.raises(AssertionError, match="exactly zero, and the MLPs of this model use silu"):
        run(tmp_path / "llama", IDS[:1, :4].tolist(), tmp_path, quantization="thresher-deft")


def answer(port, path, given=None):
    """What a server on this machine answers, as JSON; None while it is not up."""
    data = None if given is None else json.dumps(given).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as got:
            return json.loads(got.read() or b"{}")
    except urllib.error.HTTPError as reason:
        raise AssertionError(reason.read().decode()) from None
    except OSError:
        return None


@pytest.mark.slow
@needs_vllm
def test_the_openai_server_answers_with_a_checkpoint_of_ours(small, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    config = thresher.RSQ(bits=4, group_size=32)
    low = thresher.quantize(small, IDS, config, portable=True, tokenizer=tokenizer)
    folder, model, prompt = low.save_pretrained(tmp_path / "low"), low.as_model(), IDS[:1, :12]
    with torch.no_grad():
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name",
               "low", "--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]  # fmt: skip
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True) as server,
    ):
        try:
            until = time.time() + 400
            while answer(port, "/health") is None:
                assert server.poll() is None and time.time() < until, (tmp_path / "log").read_text()[-4000:]
                time.sleep(1)
            asked = {"model": "low", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
            words = " ".join(f"w{i}" for i in prompt[0].tolist())
            for given in (prompt[0].tolist(), words):
                found = answer(port, "/v1/completions", {**asked, "prompt": given})
                assert found["choices"][0]["text"].split() == [f"w{i}" for i in tokens[0, 12:].tolist()]
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
    assert "thresher" in (tmp_path / "log").read_text()
