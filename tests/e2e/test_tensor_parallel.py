"""Two ranks (gloo, CPU): replicas calibrate together, each on its own batches; a Llama sharded with DTensors is left
to Inductor, says so, and is right."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).resolve().parents[1] / "support"
WORKER = f"""
import os, sys, warnings
sys.path.insert(0, {str(SUPPORT)!r})
import torch, zoo, thresher
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

torch.set_num_threads(1)
dist.init_process_group("gloo")
model, inputs = zoo.ZOO["llama_reglu"].build()
model.config.use_cache = False
with torch.no_grad():
    expected = model(**inputs).logits
batches = [{{k: v[i : i + 2] for k, v in inputs.items()}} for i in (0, 1)]
look = {{"nvfp4": {{"min_weights": 0, "sensitive": 1}}}}
alone = thresher.calibrate(model, batches, look)
shared = thresher.calibrate(model, [batches[dist.get_rank()]], look, group=dist.group.WORLD)
assert alone.fingerprint == shared.fingerprint and len(alone["nvfp4"]) == len(shared["nvfp4"]) > 10
for site, known in alone["nvfp4"].items():
    torch.testing.assert_close(dict(shared["nvfp4"][site]), dict(known))
said_by_me = open(os.path.join(sys.argv[1], f"rank{{dist.get_rank()}}"), "w")
print("calibrated", file=said_by_me)
torch._dynamo.reset()
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    parallelize_module(layer.mlp, mesh, {{
        "gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel(),
    }})
fast = torch.compile(model, backend="thresher")
with warnings.catch_warnings(record=True) as said, torch.no_grad():
    warnings.simplefilter("always")
    actual = fast(**inputs).logits
reasons = [str(w.message) for w in said if "DTensor" in str(w.message)]
assert reasons and "left this graph to plain Inductor" in reasons[0], [str(w.message) for w in said]
real = inputs["attention_mask"].bool()
actual = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)
print(reasons[0], file=said_by_me)
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
def test_sharded_weights_are_left_to_inductor_and_said(tmp_path):
    for said in launch(WORKER, tmp_path):
        assert "calibrated" in said and "left this graph to plain Inductor" in said
