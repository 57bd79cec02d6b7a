"""Two ranks (gloo, CPU): replicas calibrate together, each on its own batches; a Llama sharded with DTensors is packed
and quantized rank by rank, and gives what one process gives whose weights are rounded in the same parts; layouts that
are not understood are left to Inductor, and pruning, which would choose other tokens on each rank, is refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).resolve().parents[1] / "support"
WORKER = f"""
import copy, os, sys
sys.path.insert(0, {str(SUPPORT)!r})
import torch, zoo, thresher
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

torch.set_num_threads(1)
dist.init_process_group("gloo")
model, inputs = zoo.ZOO["llama_reglu"].build()
model.config.use_cache, model.config.num_hidden_layers = False, 1
model.model.layers = model.model.layers[:1]
with torch.no_grad():
    expected = model(**inputs).logits
batches = [{{k: v[i : i + 2] for k, v in inputs.items()}} for i in (0, 1)]
look = {{"nvfp4": {{"min_weights": 0, "sensitive": 1}}}}
alone = thresher.calibrate(model, batches, look)
shared = thresher.calibrate(model, [batches[dist.get_rank()]], look, group=dist.group.WORLD)
assert alone.fingerprint == shared.fingerprint and len(alone["nvfp4"]) == len(shared["nvfp4"]) >= 7
for site, known in alone["nvfp4"].items():
    torch.testing.assert_close(dict(shared["nvfp4"][site]), dict(known))
said_by_me = open(os.path.join(sys.argv[1], f"rank{{dist.get_rank()}}"), "w")
print("calibrated", file=said_by_me)
torch._dynamo.reset()
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
plan = {{"self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel(),
         "self_attn.v_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel(),
         "mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}}
recipe = {{"prepack": True, "nvfp4": {{"min_weights": 0, "budget": 2}}, "zipvl": True, "target": "reference"}}
real = inputs["attention_mask"].bool()

# one process, each part of a weight rounded as its rank rounds it
def rounded(weight):
    scales = torch.ops.thresher.nvfp4_quantize(weight, "thresher", "none")
    eye = torch.eye(weight.shape[1])
    return torch.ops.thresher.nvfp4_linear(eye, *scales, None, None, "exact").T
alone = copy.deepcopy(model)
with torch.no_grad():
    for layer in alone.model.layers:
        for name, style in plan.items():
            held = layer.get_submodule(name).weight
            parts = held.chunk(2, dim=1 if isinstance(style, RowwiseParallel) else 0)
            held.copy_(torch.cat([rounded(p) for p in parts], dim=1 if isinstance(style, RowwiseParallel) else 0))
    expected = alone(**inputs).logits
    exact = model(**inputs).logits
for layer in model.model.layers:
    parallelize_module(layer, mesh, plan)
with torch.no_grad():
    actual = torch.compile(model, backend="thresher", options=recipe)(**inputs).logits
session = thresher.sessions.recent()[-1]
assert session.counters.packed == 1 and len(session.report["nvfp4"].rewritten) == 7, str(session.report)
assert "one rank's part" in session.report["zipvl"].missed[0].reason
torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)
assert (actual - exact)[real].abs().max() > 0.01
with torch.no_grad():
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.5)
        layer.mlp.up_proj.weight.mul_(2.0)
    again = torch.compile(model, backend="thresher", options=recipe)(**inputs).logits
assert session.counters.repacked
torch.testing.assert_close(again[real], expected[real], atol=1e-4, rtol=1e-4)
print("sharded", file=said_by_me)

torch._dynamo.reset()
def refused(model):
    try:
        with torch.no_grad():
            torch.compile(model, backend="thresher", options={{"strict": True}})(torch.randn(3, 8))
    except Exception as reason:
        print(reason, file=said_by_me)
class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 7)
    def forward(self, x):
        return self.inner(x).relu()
refused(parallelize_module(Odd().eval(), mesh, {{"inner": ColwiseParallel()}}))
refused(fully_shard(Odd().eval(), mesh=mesh))
said_by_me.close()
dist.destroy_process_group()
"""


def launch(code: str, tmp_path: Path) -> list[str]:
    """Run `code` on two ranks; what each of them wrote. A file for each, as two writers cut up each other's lines on
    one pipe."""
    script = tmp_path / "worker.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
         f"--master-port={port}", str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_sharded_weights_are_rewritten_rank_by_rank(tmp_path):
    for said in launch(WORKER, tmp_path):
        assert "calibrated" in said and "sharded" in said and "understood are ColwiseParallel" in said
        assert "belongs to FSDP" in said
