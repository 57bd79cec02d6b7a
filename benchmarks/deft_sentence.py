"""The example examples/deft_minilm.py as a record: MiniLM with ReLU and the density loss, end to end.

    python benchmarks/deft_sentence.py [--quick] [--json PATH] [--weight 1.5] [--state FOLDER]

The three students stand in one table: without the loss, with it, and the first thresholded to the second's density.
Training keeps checkpoints in FOLDER, and a run that was cut off goes on from there. `--quick` trains 20 steps.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from _harness import Benchmark, arguments

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "deft_minilm.py"


def main() -> None:
    def add(parser):
        parser.add_argument("--weight", type=float, default=1.5, help="of the density loss")
        parser.add_argument(
            "--state", type=Path, default=Path("minilm-relu"), help="checkpoints and the result"
        )

    args = arguments(__doc__, add)
    bench = Benchmark("deft_sentence", args)
    steps = 20 if args.quick else 150
    quality, speeds = runpy.run_path(str(EXAMPLE))["run"](steps, args.weight, args.state)
    for row in quality:
        bench.row(part="quality", **{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    for row in speeds:
        bench.row(part="speed", **{k: round(v, 4) for k, v in row.items()})
    _, control, sparse, thresholded = quality
    bench.claim(
        "MiniLM: exact density with the loss over the control's",
        sparse["density"] / control["density"],
        "<= 0.3333",
    )
    bench.claim(
        "MiniLM: halves found, less the control's (of 1)", sparse["found"] - control["found"], ">= -0.005"
    )
    bench.claim(
        "MiniLM: cosine with the original, over that of the control thresholded to the same density",
        sparse["cosine"] / thresholded["cosine"], ">= 1",
    )  # fmt: skip
    bench.claim("MiniLM, 8 tokens: dense original under Inductor / ours", speeds[0]["gain"], ">= 1")
    bench.finish()


if __name__ == "__main__":
    main()
