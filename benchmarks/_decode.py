"""One decoding step of SmolLM2 through ONNX Runtime, in fp32 and with 4-bit weights: sizes and speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, interleave

import thresher
from thresher.formats import bitpack
from thresher.graph import capture
from thresher.graph.nodes import fake_like
from thresher.graph.program import Program, Weight
from thresher.kernels import catalog

catalog.load()

PAST = 64


def step_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model as `(input_ids [1, 1], keys [L, 1, H, T, D], values) -> logits, the step's keys and values`.

    The caller keeps the cache; only what the step adds comes back, so that nothing of length T is copied.
    The weights keep their names.
    """

    class Step(type(model)):  # type: ignore[misc]
        def forward(self, input_ids, keys, values):
            from transformers import DynamicCache

            cache = DynamicCache()
            for layer in range(keys.shape[0]):
                cache.update(keys[layer], values[layer], layer)
            out = super().forward(
                input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            new = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in out.past_key_values.layers]
            return out.logits, torch.stack([k for k, _ in new]), torch.stack([v for _, v in new])

    model.__class__ = Step
    return model


def captured(model: torch.nn.Module) -> tuple[Program, tuple[torch.Tensor, ...]]:
    """The step's Program, the cache's length free, and example inputs."""
    # a real prefix: on a cache of random numbers the model amplifies rounding a thousandfold
    prefix = torch.randint(3, model.config.vocab_size, (1, PAST), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = model(prefix, use_cache=True).past_key_values.layers
    cache = (torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers]))
    inputs = (torch.tensor([[5]]), *cache)
    free = {3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        exported = torch.export.export(
            step_of(model), inputs, dynamic_shapes=(None, free, free), strict=False
        )
    return capture.from_export(exported), inputs


def rounded_to_4_bits(program: Program, group: int = 32) -> Program:
    """The layers' linears as `wna16_linear` on weights rounded to the nearest of 16 values.

    RSQ's pass emits the same operator with better codes; the codes' values change neither size nor speed.
    """
    program = program.copy()
    for node in program.nodes(torch.ops.aten.linear.default):
        weight = program.weight(node.args[1])
        if weight is None or ".layer" not in weight.fqn:
            continue
        blocks = weight.tensor.detach().float().unflatten(1, (-1, group))
        scales = blocks.abs().amax(-1) / 7
        codes = ((blocks / scales.clamp_min(1e-30)[..., None]).round() + 8).clamp(0, 15).int().flatten(1)
        held = []
        for name, tensor in (("codes", bitpack.pack(codes, 4)), ("scales", scales)):
            place = program.get_weight(Weight(f"{weight.fqn}.{name}", tensor), node)
            place.meta["val"] = fake_like(tensor, node)
            held.append(place)
        with program.graph.inserting_before(node):
            made = program.graph.call_function(
                torch.ops.thresher.wna16_linear.default, (node.args[0], *held, None, None, 4, group)
            )
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)
    program.clean()
    return program


def run(bench: Benchmark, folder: Path, model: torch.nn.Module, label: str, rounds: int) -> None:
    """Rows and the two claims of one model's decode step."""
    import onnxruntime

    program, inputs = captured(model)
    forms: dict[str, tuple[Program, dict[str, Any]]] = {
        "fp32": (program, {}),
        "int4": (rounded_to_4_bits(program), {"accuracy_level": 4, "table_bits": 8}),
    }
    sizes, calls = {}, {}
    for name, (form, options) in forms.items():
        started = time.process_time()
        record = thresher.export_onnx(form, inputs, folder / f"decode_{name}.onnx", **options)
        row = dict(section="decode", model=label, form=name, bytes=record.bytes, worst=record.worst)
        bench.row(**row, export_cpu_s=round(time.process_time() - started, 1), notes="; ".join(record.notes))
        sizes[name] = record.bytes
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(record.path, settings, providers=["CPUExecutionProvider"])
        feed = {n: t.numpy() for n, t in zip(record.inputs, inputs, strict=True)}
        calls[name] = lambda s=session, f=feed: s.run(None, f)
    times = interleave(calls, rounds=rounds, least_ms=100)
    for name, timing in times.items():
        bench.row(section="decode", model=label, form=name, **timing.fields())
    bench.claim(f"{label} int4 decode through ORT MatMulNBits, speed over fp32 ORT",
                times["fp32"].cpu_min / times["int4"].cpu_min, ">= 2.5")  # fmt: skip
    bench.claim(f"{label} int4 decode, file size over fp32", sizes["int4"] / sizes["fp32"], "<= 0.22")
