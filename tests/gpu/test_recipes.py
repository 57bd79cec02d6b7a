"""Every method on five tiny models in bf16 on a GPU, through Inductor: close to the model in fp32, without a host
wait inside a step, in a CUDA graph, and without memory that grows.

Without a GPU the same functions run on the CPU by `reference`.
"""

import functools
import gc

import masks
import pytest
import torch
import zoo

import thresher

MODELS = ("llama_reglu", "bert", "mistral", "gemma2", "gpt2")
RECIPES = {
    "prepack": {"prepack": True},
    "transprune": {"transprune": dict(stages=((1, 0.5),), min_image_tokens=1, bucket=1, min_saving=0.0,
                                      image_token_id=zoo.IMAGE_TOKEN, budget=9.0)},
    "zipvl": {"zipvl": dict(keep=0.5, recent=2, spread=2, sinks=1, bucket=1, min_saving=0.0, budget=9.0)},
    "deft": {"deft": {"min_bytes": 0}},
    "rsq": {"rsq": {"group_size": 32, "budget": 9.0}},
    "nvfp4": {"nvfp4": {"min_weights": 0, "budget": 9.0}},
}  # fmt: skip
EXACT = ("prepack", "deft")
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name, device, dtype):
    model, inputs = zoo.ZOO[name].build()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    inputs = {n: t.to(device) for n, t in inputs.items()}
    inputs["input_ids"][:, 1:3] = zoo.IMAGE_TOKEN
    return model.to(device, dtype), inputs


def options(method, model, inputs, folder):
    if method != "rsq":
        return RECIPES[method]
    low = thresher.quantize(model, [dict(inputs)], RECIPES[method])
    low.save(folder / "low.safetensors")
    return low.options


def runs(name, method, device, dtype, target, folder):
    """Compile, and compare at real tokens with the model in fp32; False where the method has nothing to do there."""
    model, inputs = build(name, device, dtype)
    exact = build(name, device, torch.float32)[0]
    try:
        fast = thresher.compile(model, inputs, options(method, model, inputs, folder), target=target)
    except thresher.errors.NothingRewrittenError:
        return False
    except thresher.errors.ThresherError as reason:
        if method == "rsq" and "layers" in str(reason):
            return False
        raise
    with torch.no_grad():
        expected, actual, own = exact(**inputs), fast(**inputs), model(**inputs)
    (_, e), (_, a), (_, o) = (masks.outputs(r)[0] for r in (expected, actual, own))
    assert a.dtype == dtype and a.isfinite().all()
    if method in EXACT:
        real = inputs["attention_mask"].bool()
        error, noise = ((t.float() - e)[real].norm() / e[real].norm() for t in (a, o))
        assert error <= 2 * noise + 1e-5, (name, method, float(error), float(noise))
    return True


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", RECIPES)
def test_a_method_on_a_model_in_bf16(name, method, tmp_path):
    ran = runs(name, method, "cuda", torch.bfloat16, "inductor", tmp_path)
    assert ran or name != "llama_reglu"


@pytest.mark.parametrize("method", RECIPES)
def test_the_same_without_a_gpu(method, tmp_path):
    assert runs("llama_reglu", method, "cpu", torch.bfloat16, "reference", tmp_path)


def step(method, device, target, mode=None):
    """A call of a compiled model on inputs that stay where they are."""
    model, inputs = build("llama_reglu", device, torch.bfloat16)
    inputs.pop("attention_mask")
    fast = thresher.compile(model, inputs, RECIPES[method], target=target, mode=mode)
    return functools.partial(fast, **inputs)


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("method", ["nvfp4", "deft"])
def test_a_replayed_step_waits_for_nothing(method):
    call = step(method, "cuda", "inductor", "reduce-overhead")
    with torch.no_grad():
        first = [call().logits.clone() for _ in range(4)]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    assert all(torch.equal(first[0], other) for other in first[1:])
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
    assert not [e.key for e in profile.key_averages() if e.key in waits]


def grows(call, measure):
    """How much more there is after 200 calls than after 5."""
    for _ in range(5):
        call()
    gc.collect()
    before = measure()
    for _ in range(200):
        call()
    gc.collect()
    return measure() - before


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("method", ["nvfp4", "deft"])
def test_memory_after_200_calls(method):
    call = step(method, "cuda", "inductor")

    def held():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    with torch.no_grad():
        assert grows(call, held) <= 0


def test_memory_after_200_calls_without_a_gpu():
    call = step("nvfp4", "cpu", "reference")
    with torch.no_grad():
        assert grows(call, lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())) <= 2
