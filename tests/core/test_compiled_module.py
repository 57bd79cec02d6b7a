"""What `thresher.compile` returns stands where the model stood: a module, for torch and for libraries."""

import copy
import io
import pickle

import pytest
import torch

import thresher
from thresher.compiled import Compiled
from thresher.errors import ArgumentError, ThresherError
from thresher.testing import TinyTransformer, tiny_model


class Tagger(TinyTransformer):
    """With a method that calls the model, and one that overrides a method of nn.Module."""

    def tag(self, batch):
        return self(**batch).argmax(-1)

    def half(self):
        self.halved = True
        return super().half()

    def itself(self):
        return self


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made():
    model, batch = tiny_model()
    model.__class__ = Tagger
    return model, batch, thresher.compile(model, batch, "exact", target="reference")


def calls(fast):
    return sum(c.calls for c in fast.counters)


def real(result, batch):
    return result[batch["attention_mask"].bool()]


def test_it_is_a_module_with_the_models_weights(made):
    model, _, fast = made
    assert isinstance(fast, torch.nn.Module) and isinstance(fast, Tagger) and isinstance(fast, Compiled)
    assert set(fast.state_dict()) == set(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    assert fast.load_state_dict(model.state_dict()).missing_keys == []
    assert "CompiledTagger" in repr(fast) and "layers" in dir(fast)


def test_every_method_that_returns_the_module_returns_the_compiled_one(made):
    _, _, fast = made
    for name in ("eval", "float", "cpu", "requires_grad_", "share_memory", "itself"):
        assert getattr(fast, name)() is fast, name
    assert fast.to("cpu") is fast and fast.train(False) is fast
    assert fast.apply(lambda m: None) is fast


def test_training_is_refused_with_the_reason(made):
    model, batch, fast = made
    for act in (fast.train, torch.nn.Sequential(fast).train):
        with pytest.raises(ArgumentError, match=r"without recording gradients.*\.model"):
            act()
    model.train()
    assert fast.eval() is fast and not model.training
    assert not fast(**batch).requires_grad


def test_a_child_runs_compiled_and_its_weights_are_found(made):
    model, batch, fast = made
    holder = torch.nn.Module()
    holder.body = fast
    assert set(holder.state_dict()) == {f"body.{n}" for n in model.state_dict()}
    holder.load_state_dict({n: t.clone() for n, t in holder.state_dict().items()})
    before = calls(fast)
    with torch.no_grad():
        torch.testing.assert_close(real(holder.body(**batch), batch), real(model(**batch), batch))
    assert calls(fast) == before + 1
    assert len(list(torch.nn.Sequential(fast, model).parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("method", ["__call__", "forward"])
def test_within_a_function_that_is_compiled_it_still_runs_its_own_graphs(made, method):
    model, batch, fast = made

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = fast

        def forward(self, **batch):
            return (self.body(**batch) if method == "__call__" else self.body.forward(**batch)) * 2

    before = calls(fast)
    with torch.no_grad():
        found = torch.compile(Holder(), backend="eager")(**batch)
        torch.testing.assert_close(real(found, batch), real(model(**batch) * 2, batch))
    assert calls(fast) == before + 1


def test_forward_is_the_compiled_one_with_the_models_signature(made):
    import inspect

    model, batch, fast = made
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    before = calls(fast)
    fast.forward(**batch)
    assert calls(fast) == before + 1
    fast.forward = lambda **batch: "other"
    assert fast(**batch) == "other" and "forward" not in model.__dict__
    del fast.forward
    assert isinstance(fast(**batch), torch.Tensor)


def test_methods_of_the_class_call_the_compiled_model_and_attributes_are_the_models(made):
    model, batch, fast = made
    before = calls(fast)
    assert torch.equal(real(fast.tag(batch), batch), real(model.tag(batch), batch))
    assert calls(fast) == before + 1
    fast.note = 3
    assert model.note == 3 and fast.note == 3
    del fast.note
    assert not hasattr(model, "note")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fast.nothing  # noqa: B018


def test_a_cast_compiles_again_on_next_use(made):
    model, batch, fast = made
    assert fast.bfloat16() is fast and not fast.sessions
    with pytest.raises(ThresherError, match="Call it once"):
        fast.report  # noqa: B018
    assert fast(**batch).dtype == torch.bfloat16 and len(fast.sessions) == 1
    assert fast.half() is fast and model.halved and model.embed.weight.dtype == torch.float16
    assert fast(**batch).dtype == torch.float16
    fast.float()
    with torch.no_grad():
        torch.testing.assert_close(real(fast(**batch), batch), real(model(**batch), batch))
    kept = fast.sessions
    assert fast.float().cpu().sessions is kept


def test_a_call_under_inference_mode_runs_the_program_made_outside(made):
    model, batch, fast = made
    with torch.no_grad():
        expected = model(**batch)
    with torch.inference_mode():
        mine = {name: t.clone() for name, t in batch.items()}
        assert mine["input_ids"].is_inference()
        found = fast(**mine)
    assert len(fast.sessions) == 1 and calls(fast) == 2
    torch.testing.assert_close(real(found, batch), real(expected, batch), atol=1e-5, rtol=1e-4)


def test_what_a_model_writes_to_its_inputs_under_inference_mode_is_there():
    class Adder(TinyTransformer):
        def forward(self, input_ids, attention_mask, seen):
            x = super().forward(input_ids, attention_mask)
            seen.add_(attention_mask.sum())
            return x

    _, batch = tiny_model()
    model = Adder().eval()
    fast = thresher.compile(model, {**batch, "seen": torch.zeros(1)}, "none", target="reference")
    with torch.inference_mode():
        seen = torch.zeros(1)
        fast(**{name: t.clone() for name, t in batch.items()}, seen=seen)
    assert float(seen) == float(batch["attention_mask"].sum())


def test_hooks_run_around_a_call(made):
    _, batch, fast = made
    seen = []
    handles = [
        fast.register_forward_pre_hook(lambda m, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True),
        fast.register_forward_hook(lambda m, args, out: out * 0),
    ]
    assert not fast(**batch).any() and seen == [["attention_mask", "input_ids"]]
    for handle in handles:
        handle.remove()
    assert fast(**batch).any() and len(seen) == 1


def pickled(fast):
    return pickle.loads(pickle.dumps(fast))


def saved(fast):
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "act",
    [
        copy.deepcopy,
        pytest.param(copy.copy, marks=pytest.mark.thorough),
        pickled,
        pytest.param(saved, marks=pytest.mark.thorough),
    ],
)
def test_copies_are_compiled_models_that_compile_when_called(made, act):
    _, batch, fast = made
    handle = fast.register_forward_hook(print)
    other = act(fast)
    handle.remove()
    assert isinstance(other, Compiled) and other.recipe == fast.recipe and other._settings == fast._settings
    assert not other.sessions and len(other._forward_hooks) == 1
    assert (other.model is fast.model) == (act is copy.copy)
    assert torch.equal(other(**batch), fast(**batch)) and other.report["prepack"].rewritten


def test_a_compiled_model_is_not_compiled_again(made):
    _, batch, fast = made
    for act in (thresher.compile, thresher.explain):
        with pytest.raises(ArgumentError, match=r"Pass the compiled model's \.model"):
            act(fast, batch)
    with pytest.raises(ArgumentError, match=r"\.model"):
        thresher.calibrate(fast, [batch], "exact")
    with pytest.raises(ArgumentError, match=r"\.model"):
        thresher.quantize(fast, [batch])
    with pytest.raises(ArgumentError, match=r"\.model"):
        thresher.export_onnx(fast, batch, "never.onnx")
