"""How quantized linears become ONNX nodes, for each runtime.

A form replaces the node by standard (or contrib) operators over weights stored anew; a 4-bit weight is
held as bytes and named in `stored`, since torch has no tensor of that type: the exporter's result gets
the real type put back (`onnx_graph.restore_types`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher import bitpack
from thresher.kernels import nvfp4_format
from thresher.program import Program, Weight, fake_like, value

from . import plain_ops
from .decompose import trace_before

RUNTIMES = ("portable", "ort", "ort-cuda", "tensorrt")
symbolic = torch.onnx.ops.symbolic
_TABLE_BLOCK = 32
FLOAT8E4M3FN, FLOAT4E2M1 = 17, 23  # numbers of onnx.TensorProto.DataType


@dataclass
class Stored:
    """The true ONNX type and shape of a weight held as bytes."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Forms:
    """The forms of one export.

    runtime: one of RUNTIMES. accuracy_level: of `MatMulNBits`; 0 computes in fp32, 4 rounds activations to int8.
    stored: true types by weight attribute. notes: sentences for the record. functions: names of model-local
    functions the result needs.
    """

    program: Program
    runtime: str
    accuracy_level: int = 0
    stored: dict[str, Stored] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)

    def replace(self, node: fx.Node) -> None:
        """Replace one `wna16_linear` or `nvfp4_linear` node."""
        {"wna16_linear": self._wna16, "nvfp4_linear": self._nvfp4}[str(node.target).split(".")[1]](node)

    # -- integers ---------------------------------------------------------------------------------

    def _wna16(self, node: fx.Node) -> None:
        arguments: tuple[Any, ...] = node.args
        x, codes_node, scales_node, zeros_node, _, bits, group = arguments
        inputs = int(value(x).shape[-1])
        codes = bitpack.unpack(self._tensor(codes_node), bits, inputs)
        scales = self._tensor(scales_node)
        zeros = self._tensor(zeros_node) if zeros_node is not None else None
        reason = no_nbits(self.runtime, inputs, bits, group, self.accuracy_level)
        if reason is None:
            self._nbits(node, codes, scales, zeros, bits, group)
        else:
            if self.runtime.startswith("ort"):
                self._note(f"{node.name}: a blocked DequantizeLinear and not MatMulNBits. {reason}")
            self._blocked(node, codes, scales, zeros, bits, group)

    def _nbits(self, node: fx.Node, codes: Any, scales: Any, zeros: Any, bits: int, group: int) -> None:
        """com.microsoft::MatMulNBits: [N, blocks, bytes] codes, fp32 scales [N, blocks]."""
        x, bias = node.args[0], node.args[4]
        outputs, inputs = codes.shape
        block = group if group > 0 else 32
        scales = scales.float() if group > 0 else scales.float().expand(-1, inputs // block)
        if zeros is None and bits == 3:
            zeros = torch.full((outputs, scales.shape[1]), 4, dtype=torch.uint8)
        if zeros is not None and group < 0:
            zeros = zeros.expand(-1, inputs // block)
        width = 4 if bits == 3 else bits  # three bits have no kernel; they are stored in four
        packed = _pack(codes.reshape(outputs, -1, block), width)
        tensors = [packed, scales.reshape(-1).contiguous()]
        if zeros is not None:
            tensors.append(_pack(_pad_to(zeros, 8 // width), width).reshape(-1))
        attributes = {
            "K": inputs,
            "N": outputs,
            "bits": width,
            "block_size": block,
            "accuracy_level": self.accuracy_level,
        }

        def form(x: Any, bias: Any, *held: Any) -> Any:
            shape = (*x.shape[:-1], outputs)
            y = symbolic(
                "com.microsoft::MatMulNBits", [x, *held], attributes, dtype=x.dtype, shape=shape, version=1
            )
            return y if bias is None else y + bias

        self._emit(node, form, x, bias, tensors)

    def _blocked(self, node: fx.Node, codes: Any, scales: Any, zeros: Any, bits: int, group: int) -> None:
        """MatMul of a blocked DequantizeLinear: [K, N] codes in INT4 or INT8, scales [K / group, N]."""
        x, bias = node.args[0], node.args[4]
        dtype = value(x).dtype
        name = "INT8" if bits == 8 else "INT4"
        middle = 1 << (bits - 1)
        if zeros is not None and bits >= 4:
            name, shift = f"U{name}", 0
        else:  # fewer bits, or symmetric: signed codes around zero
            shift = middle
        stored = codes.int() - shift
        points = None if zeros is None or bits < 4 else zeros.t()
        if zeros is not None and bits < 4:
            stored = codes.int() - zeros.int().repeat_interleave(codes.shape[1] // zeros.shape[1], 1)
        weight = self._hold(node, "codes", stored.t(), name)
        scale = self._keep(
            node, "scales", scales.to(dtype).t().contiguous() if group > 0 else scales.to(dtype).reshape(-1)
        )
        held = [weight, scale]
        if points is not None:
            held.append(self._hold(node, "zeros", points if group > 0 else points.reshape(-1), name))
        outputs, inputs = codes.shape
        attributes: dict[str, Any] = {"axis": 0, "block_size": group} if group > 0 else {"axis": 1}

        def form(x: Any, bias: Any, *held: Any) -> Any:
            w = symbolic("DequantizeLinear", list(held), attributes, dtype=x.dtype, shape=(inputs, outputs))
            y = torch.matmul(x, w)
            return y if bias is None else y + bias

        self._emit_nodes(node, form, x, bias, held)

    # -- tables -----------------------------------------------------------------------------------

    def tables(self) -> None:
        """Store embedding tables in 8 bits, and compute the head that shares one from the same codes.

        Codes [V, blocks, 32] around 128 with one fp32 scale a block: what `MatMulNBits` reads, and a row of it
        is gathered and scaled for the embedding.
        """
        embedding, linear = torch.ops.aten.embedding.default, torch.ops.aten.linear.default
        tables = {str(n.args[0].target) for n in self.program.nodes(embedding) if self._large(n.args[0])}  # type: ignore[union-attr]
        for name in sorted(tables):
            weight = self.program.weights[name]
            blocks = weight.tensor.detach().float().unflatten(1, (-1, _TABLE_BLOCK))
            scales = blocks.abs().amax(-1) / 127
            codes = (
                ((blocks / scales.clamp_min(1e-30)[..., None]).round() + 128).clamp(0, 255).to(torch.uint8)
            )
            first = next(
                n for n in self.program.nodes(embedding) if getattr(n.args[0], "target", None) == name
            )
            held = [self._keep(first, "table", codes), self._keep(first, "table_scales", scales.flatten())]
            for node in [
                n
                for n in self.program.nodes(embedding, linear)
                if name in {getattr(a, "target", None) for a in n.args}
            ]:
                self._read_table(node, weight.fqn, held)

    def _read_table(self, node: fx.Node, fqn: str, held: list[fx.Node]) -> None:
        rows, blocks = value(held[0]).shape[:2]
        attributes = {
            "K": blocks * _TABLE_BLOCK,
            "N": rows,
            "bits": 8,
            "block_size": _TABLE_BLOCK,
            "accuracy_level": 4,
        }

        def look_up(index: Any, codes: Any, scales: Any) -> Any:
            taken = codes[index].to(scales.dtype) - 128
            return (taken * scales.view(rows, blocks)[index][..., None]).flatten(-2)

        def head(x: Any, bias: Any, *table: Any) -> Any:
            shape = (*x.shape[:-1], rows)
            y = symbolic(
                "com.microsoft::MatMulNBits", [x, *table], attributes, dtype=x.dtype, shape=shape, version=1
            )
            return y if bias is None else y + bias

        if node.target is torch.ops.aten.embedding.default:
            made = trace_before(self.program, node, look_up, [node.args[1], *held])
        else:
            made = trace_before(self.program, node, head, [node.args[0], (*node.args, None)[2], *held])
        self._note(f"{fqn} is stored in 8 bits in blocks of {_TABLE_BLOCK}, which the program does not say.")
        node.replace_all_uses_with(made)
        self.program.graph.erase_node(node)

    def _large(self, node: Any) -> bool:
        weight = self.program.weight(node)
        return (
            weight is not None
            and weight.tensor.shape[0] >= 1024
            and weight.tensor.shape[1] % _TABLE_BLOCK == 0
        )

    # -- NVFP4 ------------------------------------------------------------------------------------

    def _nvfp4(self, node: fx.Node) -> None:
        given: dict[str, Any] = {"input_scale": None, "bias": None, "activations": "exact"}
        given.update(zip(given, node.args[4:]))
        given.update(node.kwargs)
        x, codes_node, scales_node, global_node = node.args[:4]
        input_node, bias, activations = given["input_scale"], given["bias"], given["activations"]
        codes = nvfp4_format.unpack(self._tensor(codes_node))
        scales = self._tensor(scales_node).view(torch.float8_e4m3fn)
        scale = self._tensor(global_node).reshape(())
        if self.runtime == "tensorrt":
            self._nvfp4_tensorrt(node, x, codes, scales, scale, input_node, bias, activations)
            return
        fp4 = self.runtime == "portable"
        held = (
            self._two_levels(node, codes, scales, scale, torch.float32)
            if fp4
            else self._doubled(node, codes, scales, scale)
        )
        outputs, columns = codes.shape
        block = nvfp4_format.BLOCK

        def form(x: Any, bias: Any, input_scale: Any, *held: Any) -> Any:
            rows, factor = plain_ops.round_activations(x, activations, input_scale)
            w = _dequantized(held, outputs, columns, block, fp4, torch.float32)
            y = torch.matmul(rows, w.t())
            y = y if activations != "nvfp4" else y * factor
            return (y if bias is None else y + bias.float()).to(x.dtype)

        made = trace_before(self.program, node, form, [x, bias, input_node, *held])
        node.replace_all_uses_with(made)
        self.program.graph.erase_node(node)

    def _two_levels(self, node: fx.Node, codes: Any, scales: Any, scale: Any, dtype: Any) -> list[fx.Node]:
        """FLOAT4E2M1 codes [N, K], FLOAT8E4M3FN scales [N, K / 16] and the tensor scale: two DequantizeLinear."""
        return [
            self._hold(node, "codes", codes, "FLOAT4E2M1"),
            self._keep(node, "scales", scales),
            self._keep(node, "scale", scale.to(dtype)),
        ]

    def _doubled(self, node: fx.Node, codes: Any, scales: Any, scale: Any) -> list[fx.Node]:
        """Twice the E2M1 values are integers: int8 [N, K] and fp32 scales [N, K / 16], exact in any runtime."""
        twice = (nvfp4_format.decode_e2m1(codes) * 2).to(torch.int8)
        self._note(
            "NVFP4 weights are stored as int8 (twice their value), exact, since ONNX Runtime's CPU kernels do not "
            "read FLOAT4E2M1: 8.5 bits a weight and not 4.5."
        )
        return [
            self._keep(node, "twice", twice),
            self._keep(node, "half_scales", scales.float() * (scale * 0.5)),
        ]

    def _nvfp4_tensorrt(
        self,
        node: fx.Node,
        x: Any,
        codes: Any,
        scales: Any,
        scale: Any,
        input_node: Any,
        bias: Any,
        activations: str,
    ) -> None:
        dtype = value(x).dtype
        held = self._two_levels(node, codes, scales, scale, dtype)
        outputs, columns = codes.shape
        block = nvfp4_format.BLOCK
        if activations in ("int8", "int16"):
            self._note(
                f"{node.name}: activations={activations!r} is a CPU mode; the engine takes them as they are."
            )
        if activations == "nvfp4":
            if input_node is None:
                raise ValueError(
                    "NVFP4 activations with the scale of each call's own maximum; TensorRT's dynamic quantization "
                    "needs a fixed tensor scale. Calibrate the model so that input_scale is set"
                )
            self.functions.add("TRT_FP4DynamicQuantize")
            input_scale = self._keep(node, "input_scale", self._tensor(input_node).reshape(()).to(dtype))
            held = [input_scale, *held]

        def form(x: Any, bias: Any, *held: Any) -> Any:
            if activations == "nvfp4":
                given, *held = held  # type: ignore[assignment]
                blocks = (*x.shape[:-1], columns // block)
                q, s = torch.onnx.ops.symbolic_multi_out(
                    "trt::TRT_FP4DynamicQuantize", [x, given],
                    {"axis": -1, "block_size": block, "scale_type": FLOAT8E4M3FN},
                    dtypes=(FLOAT4E2M1, FLOAT8E4M3FN), shapes=(tuple(x.shape), blocks), version=1,
                )  # fmt: skip
                s = symbolic("DequantizeLinear", [s, given], dtype=x.dtype, shape=blocks)
                x = symbolic(
                    "DequantizeLinear",
                    [q, s],
                    {"axis": -1, "block_size": block},
                    dtype=x.dtype,
                    shape=x.shape,
                )
            w = _dequantized(held, outputs, columns, block, True, x.dtype)
            y = torch.matmul(x, w.t())
            return y if bias is None else y + bias

        made = trace_before(self.program, node, form, [x, bias, *held])
        node.replace_all_uses_with(made)
        self.program.graph.erase_node(node)

    # -- weights ----------------------------------------------------------------------------------

    def _tensor(self, node: Any) -> torch.Tensor:
        weight = self.program.weight(node)
        if weight is None:
            raise ValueError(
                f"{getattr(node, 'name', node)} is computed in the graph; a quantized weight must be stored"
            )
        return weight.tensor.detach()

    def _keep(self, node: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        place = self.program.get_weight(Weight(f"{node.name}.{name}", tensor.contiguous()), node)
        place.meta["val"] = fake_like(tensor.contiguous(), node)
        return place

    def _hold(self, node: fx.Node, name: str, codes: torch.Tensor, dtype: str) -> fx.Node:
        """Keep integer codes under an ONNX type; two to a byte, the first in the low bits, for 4-bit types."""
        if dtype in ("INT8", "UINT8"):
            return self._keep(node, name, codes.to(torch.int8 if dtype == "INT8" else torch.uint8))
        flat = (codes.reshape(-1).int() & 0xF).to(torch.uint8)
        flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
        place = self._keep(node, name, flat[0::2] | (flat[1::2] << 4))
        self.stored[str(place.target)] = Stored(dtype, tuple(codes.shape))
        return place

    def _emit(
        self, node: fx.Node, form: Callable[..., Any], x: Any, bias: Any, tensors: list[torch.Tensor]
    ) -> None:
        held = [self._keep(node, f"part{i}", t) for i, t in enumerate(tensors)]
        self._emit_nodes(node, form, x, bias, held)

    def _emit_nodes(
        self, node: fx.Node, form: Callable[..., Any], x: Any, bias: Any, held: list[fx.Node]
    ) -> None:
        made = trace_before(self.program, node, form, [x, bias, *held])
        node.replace_all_uses_with(made)
        self.program.graph.erase_node(node)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _dequantized(
    held: Any, outputs: int, columns: int, block: int, fp4: bool, dtype: torch.dtype
) -> torch.Tensor:
    blocks: dict[str, Any] = {"axis": 1, "block_size": block}
    if not fp4:
        return symbolic("DequantizeLinear", list(held), blocks, dtype=dtype, shape=(outputs, columns))
    codes, scales, scale = held
    wide = symbolic("DequantizeLinear", [scales, scale], dtype=dtype, shape=(outputs, columns // block))
    return symbolic("DequantizeLinear", [codes, wide], blocks, dtype=dtype, shape=(outputs, columns))


def no_nbits(runtime: str, inputs: int, bits: int, group: int, accuracy_level: int) -> str | None:
    """Why a weight does not become MatMulNBits, or None."""
    if not runtime.startswith("ort"):
        return "It is an operator of ONNX Runtime alone."
    if group < 0 and inputs % 32:
        return f"It needs blocks of at least 16, and {inputs} inputs have one scale a row that 32 does not divide."
    if bits in (2, 8) and accuracy_level != 4 and runtime == "ort":
        return f"Its CPU kernel at {bits} bits with fp32 accumulation is over ten times slower than fp32."
    return None


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] codes as bytes [..., n * bits / 8], the first in the lowest bits."""
    parts = codes.to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def _pad_to(codes: torch.Tensor, step: int) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % step))
