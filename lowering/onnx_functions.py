"""Model-local ONNX functions that say in standard operators what a runtime's own operator computes."""

from __future__ import annotations

from typing import Any


def add_functions(model: Any, names: set[str]) -> None:
    """Add the named functions to a model, so that readers without the runtime's operator can run it."""
    import onnx_ir as ir

    for name in sorted(names):
        text = _FUNCTIONS[name]
        function = ir.from_onnx_text(_MODEL + text).functions
        for identifier, body in function.items():
            model.functions[identifier] = body
            model.opset_imports.setdefault(identifier[0], 1)


_MODEL = """<ir_version: 11, opset_import: ["" : 23, "trt" : 1]>
unused (float[1] x) => (float[1] y) { y = Identity(x) }
"""

# x [..., K] and the fixed tensor scale g; codes FLOAT4E2M1 [..., K] and scales FLOAT8E4M3FN [..., K / 16].
# Each block's scale is its maximum over 6 g, rounded to E4M3; codes are x over (scale * g), rounded by the cast.
_FUNCTIONS = {
    "TRT_FP4DynamicQuantize": """
<domain: "trt", opset_import: ["" : 23]>
TRT_FP4DynamicQuantize <axis: int = -1, block_size: int = 16, scale_type: int = 17> (x, g) => (codes, scales)
{
  wide = Cast <to = 1> (x)
  gw = Cast <to = 1> (g)
  shape = Shape (wide)
  first = Constant <value_ints = [0]> ()
  last = Constant <value_ints = [-1]> ()
  two = Constant <value_ints = [-1, 16]> ()
  lead = Slice (shape, first, last)
  blocked = Concat <axis = 0> (lead, two)
  blocks = Reshape (wide, blocked)
  sizes = Abs (blocks)
  minus = Constant <value_ints = [-1]> ()
  largest = ReduceMax <keepdims = 1> (sizes, minus)
  six = Constant <value_float = 6.0> ()
  top = Constant <value_float = 448.0> ()
  over = Div (largest, six)
  relative = Div (over, gw)
  bounded = Min (relative, top)
  rounded = Cast <to = 17> (bounded)
  scales = Squeeze (rounded, minus)
  step8 = Cast <to = 1> (rounded)
  step = Mul (step8, gw)
  zero = Constant <value_float = 0.0> ()
  one = Constant <value_float = 1.0> ()
  none = Equal (step, zero)
  divisor = Where (none, one, step)
  scaled = Div (blocks, divisor)
  flat = Reshape (scaled, shape)
  codes = Cast <to = 23> (flat)
}
""",
}
