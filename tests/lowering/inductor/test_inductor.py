"""Inductor's options pass through, and a second process finds the first one's code in the cache."""

import json
import subprocess
import sys

import pytest

from thresher.lowering.inductor.inductor import Inductor

SCRIPT = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import zoo
from thresher.lowering.inductor.inductor import Inductor
from torch._dynamo.utils import counters
import thresher

def spent():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)

lowering, compile_one = [0.0], Inductor._compile
def timed(self, *arguments):
    start = spent()
    made = compile_one(self, *arguments)
    lowering[0] += spent() - start
    return made
Inductor._compile = timed

model, inputs = zoo.ZOO["llama"].build()
started = spent()
made = thresher.compile(model, inputs, "exact", dynamic=True)
whole = spent() - started
logits = made(**inputs).logits
again = made(**{k: v[:2, :9].contiguous() for k, v in inputs.items()}).logits
print(json.dumps({
    "lowering": lowering[0], "whole": whole, "packed": made.counters[0].packed, "graphs": len(made.sessions),
    "hits": counters["inductor"]["fxgraph_cache_hit"], "misses": counters["inductor"]["fxgraph_cache_miss"],
    "bypasses": counters["inductor"]["fxgraph_cache_bypass"], "sum": float(logits.double().sum()),
}))
"""


def run(cache, support):
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    import os

    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(support)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


@pytest.mark.thorough
def test_a_second_process_compiles_nothing(tmp_path):
    """The rewritten graph, operators of ours included, is found in Inductor's cache: no bypass, no miss."""
    import zoo

    support = zoo.__file__.rsplit("/", 1)[0]
    cold, warm = run(tmp_path, support), run(tmp_path, support)
    assert cold["graphs"] == 1 and cold["misses"] == 1 and cold["hits"] == 0 and cold["bypasses"] == 0
    assert warm["misses"] == 0 and warm["bypasses"] == 0 and warm["hits"] == cold["misses"]
    assert warm["graphs"] == cold["graphs"] and warm["packed"] == cold["packed"] >= 2
    assert warm["sum"] == cold["sum"]


def test_only_a_trial_of_the_instruction_set_that_succeeded_is_kept(tmp_path, monkeypatch):
    from torch._inductor import config, cpu_vec_isa

    from thresher.lowering.inductor import isa_probe

    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    named = [i for i in cpu_vec_isa.supported_vec_isa_list if isa_probe._named(i, cpu_vec_isa)]
    trials = []

    def tried(works):
        trials.append(works)
        return named if works else named[1:]

    for works in (False, True, False):
        monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda works=works: tried(works))
        assert isa_probe.settings() == ({} if len(trials) == 1 else {"cpp.vec_isa_ok": True})
    assert trials == [False, True], "the third process asks the file"
    with config.patch({"cpp.vec_isa_ok": False}):
        assert isa_probe.settings() == {}, "whoever set it keeps the last word"


def test_mode_and_options_reach_inductor():
    config = Inductor({"max-autotune-gemm-backends": "CPP"}, "max-autotune")._config()
    assert config["max_autotune"] is True and config["max_autotune_gemm_backends"] == "CPP"
    assert Inductor({}, "default")._config() == {} == Inductor()._config()
    with pytest.raises(RuntimeError, match="fastest"):
        Inductor({}, "fastest")._config()
