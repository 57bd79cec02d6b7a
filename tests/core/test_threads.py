"""Threads: what torch shares between them is used under its lock, and a trace in one leaves the others alone."""

import gc
import threading

import pytest
import torch
from own_cache import own_cache
from torch._dynamo.convert_frame import compile_lock

import thresher
from thresher.compat import uncollected
from thresher.graph import tracing
from thresher.lowering.reference import Reference


def elsewhere(work):
    """What `work()` gives in another thread, or what it raises there."""
    found = []

    def run():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert found, "the other thread waits for ever"
    return found[0]


def fakes(*shapes):
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    with mode:
        return mode, [torch.empty(s) for s in shapes]


def test_another_thread_calls_modules_and_compiled_functions_while_one_traces():
    inner, x = torch.nn.Linear(4, 4).eval(), torch.randn(2, 4)
    called = torch.compile(inner, backend="eager")
    mode, given = fakes((2, 4))
    with torch.no_grad():
        want, unpatched = called(x), torch.nn.Module.__call__
        seen = []

        def run(y):
            def work():
                with torch.no_grad():
                    return called(x), inner(x), torch.nn.Module.__call__ is unpatched

            seen.append(elsewhere(work))
            return (y * 2,)

        with mode:
            traced = tracing.trace(run, given)
    first, second, same = seen[0]
    assert torch.equal(first, want) and torch.equal(second, want) and same
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [torch.ops.aten.mul.Tensor]


@pytest.mark.parametrize("before_dispatch", [True, False])
def test_the_graph_is_the_one_make_fx_gives(before_dispatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    mode, given = fakes((2, 4), (4, 4))

    def run(x, w):
        y = torch.nn.functional.linear(x, w)
        return torch.nn.functional.silu(y), y.sum(-1) + torch.ones(2)

    with mode:
        ours = tracing.trace(run, given, before_dispatch)
        theirs = make_fx(run, pre_dispatch=before_dispatch)(*given)
    assert ours.print_readable(False) == theirs.print_readable(False)


def test_this_torch_needs_no_patches():
    assert tracing._maker(True) is not None


def test_a_failed_trace_leaves_torch_as_it_was():
    mode, given = fakes((2, 4))

    def run(y):
        y * 2
        raise RuntimeError("on purpose")

    with mode, pytest.raises(RuntimeError, match="on purpose"):
        tracing.trace(run, given)
    assert not torch.compiler.is_compiling()
    model, x = torch.nn.Linear(4, 4).eval(), torch.randn(3, 4)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(elsewhere(lambda: torch.compile(model, backend="eager")(x)), want)
        compiled = thresher.compile(model, (x,), "none", target="reference")
        assert torch.equal(compiled(x), want)


class Windowed(torch.nn.Module):
    """Attention over a window: a longer batch makes the session look at the mask again, and may run padded."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv = torch.nn.Embedding(96, 32), torch.nn.Linear(32, 96)

    def forward(self, input_ids, attention_mask):
        x, at = self.embed(input_ids), torch.arange(input_ids.shape[1])
        far = at[:, None] - at[None, :]
        mask = ((far >= 0) & (far < 8))[None, None] & attention_mask[:, None, None, :].bool()
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return seen.transpose(1, 2).flatten(2) + x


def batch(rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, columns + 1, (rows,), generator=g)
    lengths[0] = columns
    mask = (torch.arange(columns)[None] < lengths[:, None]).long()
    return {"input_ids": torch.randint(0, 96, (rows, columns), generator=g), "attention_mask": mask}


class Noting(Reference):
    """Notes whether Dynamo's lock is held where something is lowered."""

    def __init__(self):
        self.held = []

    def lower(self, program):
        self.held.append(compile_lock._is_owned())
        return super().lower(program)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    return thresher.compile(Windowed().eval(), batch(3, 12), "exact", target="reference", dynamic=True)


def test_what_a_call_compiles_it_compiles_under_the_lock_of_dynamo(compiled):
    (session,) = compiled.sessions
    target, held = Noting(), []
    session.target, session._body = target, None
    look = session.program.packing.reclassify
    session.program.packing.reclassify = lambda length: held.append(compile_lock._is_owned()) or look(length)
    compiled(**batch(3, 12))
    compiled(**batch(2, 100))  # longer than what was proven
    full = batch(2, 9)
    full["attention_mask"].fill_(1)
    compiled(**full)
    assert target.held == [True, True] and held == [True] and not compile_lock._is_owned()


def test_a_loaded_file_is_lowered_under_the_lock_of_dynamo(compiled, tmp_path):
    thresher.save(compiled, tmp_path / "m.thresher", example_inputs=batch(3, 12), longest=16)
    loaded = thresher.load(tmp_path / "m.thresher", target="reference")
    target = Noting()
    loaded._lowering = lambda: target
    loaded(**batch(3, 12))
    assert target.held and all(target.held)


def test_calls_go_on_while_another_thread_compiles(compiled):
    """The lock is for what is compiled: a call of what is compiled already does not wait for it."""
    compiled(**batch(3, 12))
    with tracing.compiling():
        result = elsewhere(lambda: compiled(**batch(3, 12)))
    assert isinstance(result, torch.Tensor)


@pytest.mark.filterwarnings("ignore:thresher rewrote nothing")
@pytest.mark.parametrize("kept", [False, True], ids=["cold", "warm"])
def test_threads_that_meet_new_shapes_at_once_all_get_the_models_results(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_REWRITE_CACHE", "1")
    monkeypatch.setenv("THRESHER_CACHE_DIR", own_cache(tmp_path))
    model, example = Windowed().eval(), batch(3, 12)
    torch._dynamo.reset()
    if kept:
        thresher.compile(model, example, "exact", target="reference", dynamic=True)
        torch._dynamo.reset()
    shared = thresher.compile(model, example, "exact", target="reference", dynamic=True)
    assert kept == any("taken from the cache" in n for n in shared.report.notes)
    calls = [batch(rows, columns) for rows, columns in ((3, 12), (2, 40), (1, 9), (5, 70))]
    with torch.no_grad():
        wanted = [model(**c) for c in calls]
    wrong, start = [], threading.Barrier(5)

    def work(number):
        start.wait()
        for turn in range(2 * len(calls)):
            at = (number + turn) % len(calls)
            real = calls[at]["attention_mask"].bool()
            try:
                torch.testing.assert_close(shared(**calls[at])[real], wanted[at][real], rtol=1e-4, atol=1e-5)
            except BaseException as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_the_collector_wakes_when_the_last_thread_has_compiled():
    assert gc.isenabled()
    first, second = uncollected(), uncollected()
    with first:
        elsewhere(second.__enter__)
        assert not gc.isenabled()
    assert not gc.isenabled()  # the other thread is still at it
    second.__exit__(None, None, None)
    assert gc.isenabled()
