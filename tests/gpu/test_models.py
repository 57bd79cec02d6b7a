"""Whole models on a GPU, through Inductor's Triton code: the same results as eager, and what CUDA graphs need."""

import masks
import pytest
import torch
import zoo

import thresher

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_gpu(name, dtype):
    model, inputs = zoo.ZOO[name].build()
    return model.to("cuda", dtype), {k: v.cuda() for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "mistral", "gemma2", "gpt2"])
def test_prepacked(name, dtype):
    model, inputs = on_gpu(name, dtype)
    fast = torch.compile(model, backend="thresher")
    with torch.no_grad():
        expected, actual = model(**inputs), fast(**inputs)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    mask = inputs["attention_mask"].cpu()
    for (_, e), (_, a) in zip(masks.outputs(expected)[:1], masks.outputs(actual)[:1], strict=True):
        masks.assert_equal_at_real_tokens(a.cpu(), e.cpu(), mask, atol=tolerance * float(e.abs().max()))


@pytest.mark.parametrize(
    "recipe", [{"prepack": True}, {"nvfp4": {"min_weights": 0}}, {"deft": {"min_bytes": 0}}], ids=str
)
def test_in_a_cuda_graph(recipe):
    model, inputs = on_gpu("opt", torch.bfloat16)
    model.config.use_cache = False
    fast = thresher.compile(model, inputs, recipe, mode="reduce-overhead")
    with torch.no_grad():
        first = [fast(**inputs).logits.clone() for _ in range(4)]
    assert all(torch.equal(first[0], other) for other in first[1:])


def test_a_packed_call_waits_for_the_device_once():
    model, inputs = on_gpu("bert", torch.float16)
    fast = torch.compile(model, backend="thresher")
    with torch.no_grad():
        for _ in range(3):
            fast(**inputs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fast(**inputs)
    waits = sum(
        e.count for e in profile.key_averages() if e.key in ("aten::_local_scalar_dense", "aten::item")
    )
    copies = sum(e.count for e in profile.key_averages() if e.key == "cudaStreamSynchronize")
    assert waits // 2 + copies <= 2  # the lengths, and what is read with them
