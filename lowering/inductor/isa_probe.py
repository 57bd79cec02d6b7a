"""Remembers that this machine's vector instructions work, which Inductor otherwise tries out in each process.

Before its first C++ kernel Inductor starts a Python for every instruction set the processor names, to see a
library built for it load. With a warm cache that is half of what lowering costs. Here the trial's success is
kept under a name that holds torch, the compiler and the processor's features; a failure is never kept.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from thresher.files import cache_folder, keep, trusted
from thresher.kernels import native


def settings() -> dict[str, Any]:
    """Inductor's configuration that spares the trial, once it has succeeded here; empty where it did not.

    Whoever set the option, or TORCHINDUCTOR_VEC_ISA_OK, keeps the last word.
    """
    try:
        from torch._inductor import config, cpu_vec_isa
        from torch._inductor.cpp_builder import get_cpp_compiler

        if config.cpp.vec_isa_ok is not None:
            return {}
        folder = cache_folder("isa")
        if folder is None:
            return {}
        kept = folder / _key(get_cpp_compiler())
        if not trusted(kept):
            named = [i for i in cpu_vec_isa.supported_vec_isa_list if _named(i, cpu_vec_isa)]
            if not named or named != cpu_vec_isa.valid_vec_isa_list():  # this is Inductor's own trial
                return {}
            keep(kept, b"")
    except Exception:  # private parts of torch, which another version may not have: it tries for itself
        return {}
    return {"cpp.vec_isa_ok": True}


def _named(isa: Any, module: Any) -> bool:
    """Whether the processor names all flags of an instruction set."""
    return set(str(isa).split()) <= set(module.x86_isa_checker())


def _key(compiler: str) -> str:
    facts = [torch.__version__, compiler, native._compiler_version(compiler), *sorted(native.cpu_features())]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
