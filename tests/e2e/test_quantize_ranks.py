"""Two ranks (gloo, CPU) that quantize one model together: the codes of one process, an error of one raised on both, and
finished layers that both read."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
WORKER = f"""
import os, sys
sys.path.insert(0, {str(SUPPORT)!r})
import torch, transformers as hf, thresher, thresher.quantization
if not os.fork():  # imported once for both
    os.environ["RANK"] = "1"
rank = int(os.environ["RANK"])
import torch.distributed as dist
from thresher.passes.rsq.quantizer import driver

out = open(os.path.join(sys.argv[1], f"rank{{rank}}"), "w")
torch.set_num_threads(1)
dist.init_process_group("gloo")
group = dist.group.WORLD
torch.manual_seed(0)
model = hf.MixtralForCausalLM(hf.MixtralConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64)).eval()
ids = torch.randint(3, 60, (10, 12), generator=torch.Generator().manual_seed(0))  # three batches: two for rank 0
folder = os.path.join(sys.argv[1], "layers")
recipe = thresher.RSQ(bits=4, average_bits=3.0)
capture, known = thresher.quantization._capture, []
def captured(*given):
    known.extend([capture(*given)] if not known else [])
    return known[0]
thresher.quantization._capture = captured  # once for all runs on token ids
if rank == 0:
    alone = thresher.quantize(model, ids, recipe)

batches = [{{"inputs_embeds": torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(i))}} for i in range(2)]
batches[1]["inputs_embeds"][0, 3] = float("nan")
thresher.quantization._capture = capture
try:
    thresher.quantize(model, batches, thresher.RSQ(bits=4, importance="uniform"), group=group)
except driver.HessianError as error:
    assert "batch 1 of the calibration data" in str(error), error
    assert rank == 1 or "rank 1: " in str(error), error
    print("refused", file=out)

thresher.quantization._capture = captured
shared = thresher.quantize(model, ids, recipe, folder=folder, group=group)
again = thresher.quantize(model, ids, recipe, folder=folder, group=group)  # from the files

if rank:
    alone = shared  # compared on the first
mine, theirs, kept = (q.statistics["rsq"] for q in (alone, shared, again))
assert mine.keys() == theirs.keys() == kept.keys() and any("experts" in k for k in mine)
different = total = 0
first = "model.layers.0.self_attn.q_proj"  # nothing before it could differ
apart = (mine[first]["codes"] != theirs[first]["codes"]).float().mean()
assert apart <= 0.01, apart
for site, tensors in mine.items():
    for part, tensor in tensors.items():
        assert torch.equal(theirs[site][part], kept[site][part]), (site, part)
        if part == "codes":
            different += int((tensor != theirs[site][part]).sum())
            total += tensor.numel()
assert different <= 0.02 * total, (different, total)  # sums over tokens in another order
assert len(shared.report.importance) == len(alone.report.importance) > 0
for name, scores in alone.report.importance.items():
    assert sorted(scores.tolist()) == sorted(shared.report.importance[name].tolist()) or torch.allclose(
        scores, shared.report.importance[name], rtol=1e-2), name
both = [None, None]
dist.all_gather_object(both, {{s: {{p: t.tolist() for p, t in ts.items()}} for s, ts in theirs.items()}})
assert both[0] == both[1]
print("same", file=out)
dist.barrier()
dist.destroy_process_group()
out.close()
if rank == 0:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
def test_two_ranks_share_the_work(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", WORKER, str(tmp_path)], env=environment, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text().split() == ["refused", "same"]
