"""A static cache, which the model writes to: decoding reads what its mask shows, writes in place, and says what it did."""

import warnings

import pytest
import tiny_llama
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import thresher
from thresher import model_capture, sessions
from thresher.errors import ArgumentError, CaptureError
from thresher.passes.calibrate import Calibration
from thresher.recipe import Recipe

ROWS, WIDTH, ROOM = 3, 10, 32


def mistral(**sizes: int) -> MistralForCausalLM:
    """Its window is narrower than the prompt, so its cache is a ring."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**(tiny_llama.SIZES | sizes), sliding_window=6)).eval()


def prompt() -> dict[str, torch.Tensor]:
    """Rows of 6, 3 and 10 tokens, padded on the left."""
    mask = (torch.arange(WIDTH) >= torch.tensor([4, 7, 0])[:, None]).long()
    return {"input_ids": tiny_llama.prompt(ROWS, WIDTH, span=None), "attention_mask": mask}


def static(model: LlamaForCausalLM) -> StaticCache:
    """A static cache with the prompt in it."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
    return cache


def decode(call, cache, steps=3):
    mask = torch.zeros(ROWS, ROOM, dtype=torch.long)
    mask[:, :WIDTH] = prompt()["attention_mask"]
    token, logits = torch.full((ROWS, 1), 5), []
    for step in range(WIDTH, WIDTH + steps):
        mask[:, step] = 1
        with torch.no_grad():
            out = call(input_ids=token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                       past_key_values=cache)  # fmt: skip
        token = out.logits[:, -1:].argmax(-1)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("target", ["reference", "inductor"])
def test_decoding_equals_the_model_and_the_cache_is_written_where_it_lies(target):
    torch._dynamo.reset()
    model = tiny_llama.make()
    expected_cache, cache = static(model), static(model)
    expected = decode(model, expected_cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    fast = torch.compile(model, backend="thresher", options={"target": target, "strict": True}, dynamic=False)
    torch.testing.assert_close(decode(fast, cache), expected, rtol=1e-4, atol=1e-5)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    for ours, theirs in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
        assert ours.cumulative_length == theirs.cumulative_length == WIDTH + 3
    report = sessions.recent()[-1].report
    assert len(report["decode_attention"].rewritten) == 3 and report["decode_attention"].error < 1e-5


def test_the_program_reads_each_key_head_once():
    torch._dynamo.reset()
    model = tiny_llama.make()
    options = {"target": "reference", "decode_attention": True, "recipe": "none"}
    decode(torch.compile(model, backend="thresher", options=options, dynamic=False), static(model), 1)
    program = sessions.recent()[-1].program
    (first, *_) = program.nodes(torch.ops.thresher.kv_attention.default)
    assert (
        first.args[2].target is torch.ops.aten.index_copy.default
    )  # the cache itself, not repeated for queries
    assert len(program.updates) == 3 * 3  # keys, values and length of each layer


@pytest.mark.parametrize(
    "make, options",
    [
        (mistral, {"target": "reference"}),
        pytest.param(mistral, None, marks=pytest.mark.thorough),
        pytest.param(tiny_llama.make, None, marks=pytest.mark.thorough),
    ],
)
def test_generate_compiles_its_decode_step(make, options):
    torch._dynamo.reset()
    model = make(num_hidden_layers=2)
    given = {**prompt(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
             "cache_implementation": "static"}  # fmt: skip
    config = CompileConfig(backend="thresher", mode="default" if options is None else None, options=options)
    config._compile_all_devices = True  # transformers compiles for accelerators only unless told so
    with warnings.catch_warnings():
        warnings.simplefilter("error", thresher.ThresherWarning)
        generated = model.generate(**given, compile_config=config)
    assert generated.equal(model.generate(**given, disable_compile=True))
    assert len(sessions.recent()[-1].report["decode_attention"].rewritten) == 2


def test_a_compiled_model_generates_compiled():
    torch._dynamo.reset()
    model = tiny_llama.make(num_hidden_layers=1)
    given = {**prompt(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given)
    fast = thresher.compile(model, prompt(), target="reference", dynamic=True)
    assert fast.generate(**given).equal(expected) and "forward" not in vars(model)
    assert sum(c.packed for c in fast.counters) == 2  # the example, and the prefill
    assert sum(c.calls for c in fast.counters) == 9
    with pytest.raises(ArgumentError, match="Leave it out"):
        fast.generate(**given, compile_config=CompileConfig())
    with pytest.raises(ArgumentError, match="has no generate"):
        thresher.compile(
            Store().eval(), stored(torch.zeros(4, 8), torch.ones(3, 8)), recipe="none"
        ).generate()


@pytest.mark.parametrize("make", [pytest.param(tiny_llama.make, marks=pytest.mark.thorough), mistral])
def test_its_prefill_is_packed_before_a_static_cache_too(make):
    torch._dynamo.reset()
    model = make(num_hidden_layers=1)
    given = {**prompt(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
             "cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    expected = model.generate(**given)
    fast = thresher.compile(model, prompt(), target="reference", dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", thresher.ThresherWarning)
        made = fast.generate(**given)
    assert made.sequences.equal(expected.sequences)
    torch.testing.assert_close(torch.stack(made.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)
    cache, plain = made.past_key_values, expected.past_key_values
    assert isinstance(cache, StaticCache) and cache.get_seq_length() == plain.get_seq_length()
    shown = prompt()["attention_mask"].bool()
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert ours.keys.shape[2] == WIDTH + 8 - 1, "a layer with a window keeps all tokens too"
        at = shown if theirs.keys.shape[2] >= WIDTH else slice(0, 0)
        size = shown.shape[1] if theirs.keys.shape[2] >= WIDTH else 0
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(
                a.transpose(1, 2)[:, :size][at], b.transpose(1, 2)[:, :size][at], rtol=1e-4, atol=1e-5
            )
    assert sum(c.packed for c in fast.counters) == 2  # the example, and the prefill
    assert sum(c.calls for c in fast.counters) == 9 and not {"forward", "prepare_inputs_for_generation"} & {
        *vars(model)
    }


def test_a_decoder_beside_an_encoder_is_not_packed_and_says_so():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
    ).eval()
    given = {**prompt(), "max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    example = {**prompt(), "decoder_input_ids": torch.zeros(ROWS, 1, dtype=torch.long)}
    fast = thresher.compile(model, example, target="reference", dynamic=True)
    with pytest.warns(thresher.ThresherWarning, match="not one whole prompt"):
        assert fast.generate(**given).equal(model.generate(**given))


def test_a_prefill_that_writes_its_cache_is_not_packed():
    torch._dynamo.reset()
    model = mistral()  # whose attention reads the new keys and not its cache
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    cache.early_initialization(ROWS, 2, 8, torch.float32, torch.device("cpu"))
    fast = torch.compile(model, backend="thresher", options={"target": "reference"}, dynamic=False)
    with pytest.warns(thresher.ThresherWarning, match="rewrote nothing"), torch.no_grad():
        out = fast(**prompt(), past_key_values=cache)
    with torch.no_grad():
        expected = model(**prompt(), past_key_values=StaticCache(config=model.config, max_cache_len=ROOM))
    real = prompt()["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=1e-4, atol=1e-5)
    (missed,) = sessions.recent()[-1].report["prepack"].missed
    assert "writes to keys, values" in missed.reason and "other places" in missed.reason


def test_from_a_cache_that_was_handed_back():
    torch._dynamo.reset()
    model = tiny_llama.make(num_hidden_layers=1)
    options = {"target": "reference"}
    handed = torch.compile(model, backend="thresher", options=options, dynamic=True)
    with torch.no_grad():
        out = handed(**prompt(), past_key_values=DynamicCache())
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    for index, layer in enumerate(out.past_key_values.layers):
        cache.update(layer.keys, layer.values, index)
    steady = torch.compile(model, backend="thresher", options=options, dynamic=False)
    torch.testing.assert_close(decode(steady, cache), decode(model, static(model)), rtol=1e-4, atol=1e-5)


def test_calibrating_writes_to_the_cache_too():
    model = tiny_llama.make()
    cache, expected = static(model), static(model)
    step = {"input_ids": torch.full((ROWS, 1), 5), "attention_mask": torch.ones(ROWS, ROOM, dtype=torch.long)}
    torch._dynamo.reset()
    watched = torch.compile(
        model,
        backend=model_capture.watching(Calibration(Recipe.of(nvfp4={"min_weights": 1, "sensitive": 0.5}))),
        dynamic=False,
    )
    with torch.no_grad():
        watched(**step, past_key_values=cache)
        model(**step, past_key_values=expected)
    torch.testing.assert_close(cache.layers[-1].keys, expected.layers[-1].keys)
    assert cache.layers[0].cumulative_length == WIDTH + 1


class Store(torch.nn.Module):
    """Writes a row of a table and reads it."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 8)

    def forward(self, table, other, row, x):
        table.index_copy_(0, row, self.up(x))
        return table.sum(0) + other.sum(0)


def stored(table, other):
    return table, other, torch.tensor([2]), torch.ones(1, 8)


def test_a_saved_program_writes_to_its_callers_tensor(tmp_path):
    model = Store().eval()
    given = stored(torch.zeros(4, 8), torch.ones(3, 8))
    compiled = thresher.compile(model, given, recipe="none", dynamic=False)
    path = thresher.save(compiled, tmp_path / "store", example_inputs=given)
    theirs, ours = (stored(torch.zeros(4, 8), torch.ones(3, 8)) for _ in range(2))
    named = dict(zip(("table", "other", "row", "x"), ours))
    with torch.no_grad():
        torch.testing.assert_close(thresher.load(path, target="reference")(**named)["output"], model(*theirs))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[0][2].abs().sum() > 0


def test_inputs_that_share_memory_are_refused():
    torch._dynamo.reset()
    whole = torch.zeros(6, 8)
    fast = torch.compile(Store().eval(), backend="thresher", dynamic=False,
                         options={"recipe": "none", "target": "reference", "strict": True})  # fmt: skip
    with torch.no_grad(), pytest.raises(Exception, match="the same memory as other"):
        fast(*stored(whole[:4], whole[3:]))
    apart = torch.zeros(8, 8)
    with torch.no_grad():
        fast(*stored(apart[:4], apart[4:]))
    assert apart[2].abs().sum() > 0 and not apart[4:].any()


def test_onnx_has_no_such_writes(tmp_path):
    given = stored(torch.zeros(4, 8), torch.ones(3, 8))
    with pytest.raises(CaptureError, match="The model writes to 'table' in its forward"):
        thresher.export_onnx(Store().eval(), given, tmp_path / "store.onnx")
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Store().eval(), backend="thresher", options={"recipe": "none", "target": "reference"})(
            *given
        )
    with pytest.raises(ArgumentError, match="writes to its inputs"):
        thresher.export_onnx(sessions.recent()[-1].program, given, tmp_path / "store.onnx")
