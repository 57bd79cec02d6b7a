"""First results do not wait for a compiler, unless they are told to; what then runs is the compiled form."""

import os
import subprocess
import sys
import threading

import pytest
import tiny_llama
import torch

import thresher
from thresher import waiting
from thresher.lowering.inductor import inductor, later


@pytest.fixture
def compiles(monkeypatch):
    """Inductor's place is taken by what records the graphs; calls need not wait."""
    made = []

    def compile(module, *_):
        made.append(threading.current_thread().name)
        return module.forward

    monkeypatch.setattr(inductor, "_compile", compile)
    monkeypatch.setenv(waiting.SWITCH, "0")
    later._PENDING.clear()
    return made


def settle():
    """Wait for the background."""
    thread = later.begin()
    if thread is not None:
        thread.join()


def test_it_runs_plainly_until_it_is_compiled(compiles):
    one = later.Later(lambda x: x + 1, lambda: lambda x: x + 10)
    with waiting.at_once():
        assert one(1) == 2 and one.early == 1 and not one.ready
        settle()
        assert one(1) == 11 and one.early == 1 and one.ready and one.phases["lowering"] >= 0
    assert later.begin() is None


def test_lazy_ones_are_compiled_by_a_call_that_waits(compiles):
    one = later.Later(lambda x: x + 1, lambda: lambda x: x + 10)
    with waiting.at_once(waiting.LAZY):
        assert one(1) == 2
    assert later.begin() is None
    assert one(1) == 11 and one.ready


def test_calls_that_wait_compile_first(compiles, monkeypatch):
    one = later.Later(lambda x: x + 1, lambda: lambda x: x + 10)
    assert one(1) == 11 and one.early == 0
    monkeypatch.setenv(waiting.SWITCH, "1")
    with waiting.at_once():
        assert not waiting.is_at_once()


def test_what_cannot_be_compiled_goes_on_plainly_and_says_why(compiles, caplog):
    def fails():
        raise RuntimeError("no compiler")

    one = later.Later(lambda x: x + 1, fails)
    with waiting.at_once():
        assert one(1) == 2
        settle()
        assert one(1) == 2 and one.failed == "RuntimeError: no compiler"
    assert "no compiler" in caplog.text
    with pytest.raises(RuntimeError, match="no compiler"):
        later.Later(lambda x: x, fails)(1)


def test_a_process_that_ends_does_not_wait_for_more_than_one_step_of_the_compiler(compiles):
    script = (
        "import time\n"
        "from thresher import waiting\n"
        "from thresher.lowering.inductor import later\n"
        "def compile():\n"
        "    for _ in range(600):\n"
        "        time.sleep(.1)\n"
        "        later.still_wanted()\n"
        "one = later.Later(lambda: None, compile)\n"
        "with waiting.at_once():\n"
        "    one()\n"
        "later.begin()\n"
    )
    environment = {**os.environ, waiting.SWITCH: "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, timeout=45, capture_output=True, text=True
    )
    assert done.returncode == 0 and "could not be compiled" not in done.stderr


def test_a_program_that_nobody_has_is_not_compiled(compiles):
    ran = []
    one = later.Later(lambda x: x, lambda: ran.append(1))
    with waiting.at_once():
        one(1)
    del one
    settle()
    assert not ran


def test_generate_makes_its_first_tokens_at_once_and_the_same_ones_compiled(compiles, tmp_path):
    model = tiny_llama.make(num_hidden_layers=1)
    ids = tiny_llama.prompt(span=None)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    fast = thresher.compile(model, batch, "exact")
    assert not compiles  # of a model that generates, what no call has waited for
    expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(fast.generate(**batch, max_new_tokens=3, do_sample=False), expected)
    assert fast.last_call.early == 1 and "before their program was compiled" in str(fast.last_call)
    settle()
    assert compiles == ["thresher-compiles"]
    assert any("did not wait" in note for report in fast.reports for note in report.notes)
    assert torch.equal(fast.generate(**batch, max_new_tokens=3, do_sample=False), expected)
    assert fast.last_call.early == 0 and len(compiles) == 1
    real = mask.bool()
    torch.testing.assert_close(fast(**batch).logits[real], model(**batch).logits[real], rtol=1e-4, atol=1e-4)
    assert compiles[1:] == [threading.main_thread().name]  # a call of one's own waits

    path = thresher.save(fast, tmp_path / "model.thresher", example_inputs=batch)
    for wait in (False, True):
        loaded, before = thresher.load(path, wait=wait), len(compiles)
        made = loaded(**batch)["logits"]
        torch.testing.assert_close(made[real], model(**batch).logits[real], rtol=1e-4, atol=1e-4)
        if not wait:
            assert [one.early for one in loaded.session.later] == [1]
            settle()
        assert len(loaded.session.later) == (not wait) and len(compiles) == before + 1
