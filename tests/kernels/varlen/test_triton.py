"""The Triton kernel of packed attention: right in the interpreter, and fit for each GPU generation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampled import sampled
from triton_aot import CAPABILITIES, compile_for, resources

from thresher.kernels.varlen import cuda as varlen_cuda
from thresher.kernels.varlen import triton_kernels as varlen_triton
from thresher.kernels.varlen.attention import varlen_attention

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
STRIDES = [f"{name}_{dim}" for name in ("q", "k", "v", "out") for dim in ("head", "token")]
MASK_STRIDES = ["mask_b", "mask_h", "mask_m", "mask_n"]


def build(
    capability,
    dtype,
    width,
    *,
    causal=True,
    windowed=False,
    softcap=False,
    mask=varlen_triton.NO_MASK,
    sinks=False,
):
    pointer = f"*{TYPES[dtype]}"
    signature = dict.fromkeys(("q", "k", "v", "out"), pointer)
    signature |= {
        "cu_seqlens": "*i32",
        "rows": "*i64",
        "cols": "*i64",
        "sinks": "*fp32" if sinks else pointer,
    }
    signature["mask"] = "*u8" if mask == varlen_triton.BOOL_MASK else pointer
    signature |= dict.fromkeys([*STRIDES, *MASK_STRIDES, "window"], "i32")
    signature |= dict.fromkeys(("scale", "softcap"), "fp32")
    cut = varlen_cuda.tiling(width, dtype, mask != varlen_triton.NO_MASK, capability)
    constants = {
        "GROUP": 3, "D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "CAUSAL": causal,
        "WINDOWED": windowed, "SOFTCAP": softcap, "MASK": mask, "SINKS": sinks, "BM": cut.queries, "BN": cut.keys,
        "PRECISION": "tf32x3",
    }  # fmt: skip
    pointers = ("q", "k", "v", "out", "cu_seqlens", "mask", "rows", "cols", "sinks")
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return resources(
        compile_for(
            capability,
            varlen_triton.varlen_forward,
            signature,
            constants,
            aligned=(*pointers, *STRIDES),
            **options,
        )
    )


VARIANTS = {
    "causal": {},
    "window and soft cap": {"windowed": True, "softcap": True},
    "window and sinks": {"windowed": True, "sinks": True},
    "bidirectional with a float mask": {"causal": False, "mask": varlen_triton.FLOAT_MASK},
}


def test_fits_a_hopper_gpu():
    build(90, torch.float16, 64).require_fit(90, tensor_cores=True)


TILES = ((torch.float16, 64), (torch.bfloat16, 128), (torch.float16, 256))
# Every variant where most registers and shared memory are taken, and every tile.
PLAIN = [
    *((120, (torch.float16, 256), variant) for variant in VARIANTS),
    (90, (torch.bfloat16, 128), "window and soft cap"),
    (120, (torch.float16, 64), "bidirectional with a float mask"),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability, tile, variant", sampled(PLAIN, CAPABILITIES, TILES, VARIANTS))
def test_nothing_spills_and_tensor_cores_are_used(capability, tile, variant):
    dtype, width = tile
    build(capability, dtype, width, **VARIANTS[variant]).require_fit(capability, tensor_cores=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", sampled([120], CAPABILITIES))
def test_float32_runs_on_tensor_cores_too(capability):
    build(capability, torch.float32, 64).require_fit(capability, tensor_cores=True)


def test_the_interpreter_agrees_with_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("varlen_interpreted.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0 and done.stdout.strip() == "interpreted", done.stderr[-3000:]


def test_the_tiling_depends_on_nothing_but_width_dtype_and_mask():
    """A tiling by length would let one segment change the bits of another."""
    for dtype in TYPES:
        for masked in (False, True):
            assert all(
                varlen_cuda.tiling(w, dtype, masked, 90) == varlen_cuda.tiling(64, dtype, masked, 90)
                for w in (1, 16, 33)
            )


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_providers_say_why_they_cannot_run_here():
    for provider in varlen_attention.providers:
        if provider.device == "cuda":
            assert varlen_attention.usable(provider) == "PyTorch sees no CUDA GPU."


def test_flash_attention_is_passed_over_with_a_reason():
    def asked(dtype=torch.float16, width=64, softcap=0.0, tokens=8, sinks=None):
        q = torch.empty(1, 2, tokens, width, dtype=dtype)
        return varlen_cuda._torch_supports_args(q, q, q, None, 8, 1.0, True, -1, softcap, sinks)

    assert asked() is None
    assert "soft cap" in asked(softcap=1.0) and "sinks" in asked(sinks=torch.zeros(2))
    assert "float32" in asked(dtype=torch.float32)
    assert "multiple of 8" in asked(width=20) and "multiple of 8" in asked(width=264)
    assert "no tokens" in asked(tokens=0)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["torch_varlen", "triton"])
def test_a_neighbour_changes_no_bit_on_the_gpu(provider):
    lengths = [700, 33, 1024, 5]
    offsets = torch.tensor([0, 700, 733, 1757, 1762], dtype=torch.int32, device="cuda")
    tensors = [torch.randn(1, 1762, h, 64, device="cuda").half().transpose(1, 2) for h in (8, 2, 2)]
    with varlen_attention.force(provider):
        before = varlen_attention(*tensors, offsets, max(lengths), 0.125, True, -1, 0.0)
        for tensor in tensors:
            tensor[:, :, 700:733] = torch.nan
        after = varlen_attention(*tensors, offsets, 4096, 0.125, True, -1, 0.0)
    assert torch.equal(before[:, :, :700], after[:, :, :700])
    assert torch.equal(before[:, :, 733:], after[:, :, 733:])
