"""Model-local ONNX functions: packed attention around a runtime's own operator, and what such operators mean in
standard ones."""

from __future__ import annotations

from typing import Any


def add_functions(model: Any, names: set[str]) -> None:
    """Add the named functions to a model, so that readers without the runtime's operator can run it."""
    import onnx_ir as ir

    for name in sorted(names):
        for identifier, body in ir.from_onnx_text(_MODEL + FUNCTIONS[name]).functions.items():
            model.functions[identifier] = body
            model.opset_imports.setdefault(identifier[0], 1)
            for domain, version in body.opset_imports.items():
                model.opset_imports.setdefault(domain, version)


_MODEL = """<ir_version: 11, opset_import: ["" : 23, "trt" : 1]>
unused (float[1] x) => (float[1] y) { y = Identity(x) }
"""

_NUMBERS = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  minus = Constant <value_ints = [-1]> ()
  far = Constant <value_ints = [2147483647]> ()
"""

# Of packed tokens [1, heads, T, D] and the sequences' offsets int32 [B + 1]: rows [T, heads * D]; each sequence's
# length; which slots of [B, longest] hold a token, and the slots' numbers in the order of the tokens.
_LAYOUT = f"""
{_NUMBERS}
  count = Shape <start = 2, end = 3> (q)
  heads = Shape <start = 1, end = 2> (q)
  head_width = Shape <start = 3, end = 4> (q)
  all_heads = Mul (heads, head_width)
  kv_heads = Shape <start = 1, end = 2> (k)
  all_kv_heads = Mul (kv_heads, head_width)
  rows = Concat <axis = 0> (count, all_heads)
  kv_rows = Concat <axis = 0> (count, all_kv_heads)
  q_tokens = Transpose <perm = [0, 2, 1, 3]> (q)
  k_tokens = Transpose <perm = [0, 2, 1, 3]> (k)
  v_tokens = Transpose <perm = [0, 2, 1, 3]> (v)
  q_rows = Reshape <allowzero = 1> (q_tokens, rows)
  k_rows = Reshape <allowzero = 1> (k_tokens, kv_rows)
  v_rows = Reshape <allowzero = 1> (v_tokens, kv_rows)
  offsets = Cast <to = 7> (cu)
  starts = Slice (offsets, zero, minus)
  ends = Slice (offsets, one, far)
  lengths = Sub (ends, starts)
  largest = ReduceMax <keepdims = 1> (lengths)
  longest = Max (largest, one)
  limit = Squeeze (longest)
  from = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  place = Range (from, limit, step)
  lengths_column = Unsqueeze (lengths, one)
  real = Less (place, lengths_column)
  flags = Reshape (real, minus)
  found = NonZero (flags)
  slots = Squeeze (found, zero)
  shape = Shape (q_tokens)
"""

# x [..., K] and the fixed tensor scale g; codes FLOAT4E2M1 [..., K] and scales FLOAT8E4M3FN [..., K / 16].
# Each block's scale is its maximum over 6 g, rounded to E4M3; codes are x over (scale * g), rounded by the cast.
FUNCTIONS = {
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
    # Each sequence a row as long as the longest, filled up with other tokens, which no result is read from; an empty
    # one is given one of them, since the operator wants a length of at least 1.
    "PackedAttention": f"""
<domain: "thresher", opset_import: ["" : 23, "com.microsoft" : 1]>
PackedAttention <num_heads, kv_num_heads, scale, softcap, causal> (q, k, v, cu) => (out)
{{
{_LAYOUT}
  starts_column = Unsqueeze (starts, one)
  wanted = Add (starts_column, place)
  last_token = Sub (count, one)
  index = Min (wanted, last_token)
  q_padded = Gather (q_rows, index)
  k_padded = Gather (k_rows, index)
  v_padded = Gather (v_rows, index)
  at_least = Max (lengths, one)
  before = Sub (at_least, one)
  last = Cast <to = 6> (before)
  total = Cast <to = 6> (longest)
  padded, present_k, present_v = com.microsoft.GroupQueryAttention <num_heads: int = @num_heads,
    kv_num_heads: int = @kv_num_heads, scale: float = @scale, softcap: float = @softcap, causal: int = @causal>
    (q_padded, k_padded, v_padded, , , last, total)
  flat = Concat <axis = 0> (minus, all_heads)
  results = Reshape (padded, flat)
  taken = Gather (results, slots)
  tokens = Reshape <allowzero = 1> (taken, shape)
  out = Transpose <perm = [0, 2, 1, 3]> (tokens)
}}
""",
    # The operator wants the slots in a padded batch of all tokens, then of all padding.
    "PackedEncoderAttention": f"""
<domain: "thresher", opset_import: ["" : 23, "com.microsoft" : 1]>
PackedEncoderAttention <num_heads, scale> (q, k, v, cu) => (out)
{{
{_LAYOUT}
  padding = Not (flags)
  others = NonZero (padding)
  other_slots = Squeeze (others, zero)
  order = Concat <axis = 0> (slots, other_slots)
  batch = Shape (real)
  table = Reshape (order, batch)
  token_offset = Cast <to = 6> (table)
  results = com.microsoft.PackedMultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>
    (q_rows, k_rows, v_rows, , token_offset, cu)
  tokens = Reshape <allowzero = 1> (results, shape)
  out = Transpose <perm = [0, 2, 1, 3]> (tokens)
}}
""",
    # What PackedMultiHeadAttention is documented to compute: a token sees those of its row in the padded batch and of
    # its sequence, which must be the same ones. For checks where its kernel cannot run.
    "PackedMultiHeadAttention": f"""
<domain: "thresher", opset_import: ["" : 23]>
PackedMultiHeadAttention <num_heads, scale> (q, k, v, bias, token_offset, cu) => (out)
{{
{_NUMBERS}
  count = Shape <start = 0, end = 1> (q)
  width = Shape <start = 1, end = 2> (token_offset)
  wide = Cast <to = 7> (token_offset)
  offsets = Reshape (wide, minus)
  slots = Slice (offsets, zero, count)
  row = Div (slots, width)
  row_column = Unsqueeze (row, one)
  same_row = Equal (row_column, row)
  ends = Slice (cu, one, far)
  limit = Squeeze (count)
  from = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  places = Range (from, limit, step)
  place = Cast <to = 6> (places)
  place_column = Unsqueeze (place, one)
  behind = GreaterOrEqual (place_column, ends)
  passed = Cast <to = 7> (behind)
  sequence = ReduceSum <keepdims = 0> (passed, one)
  sequence_column = Unsqueeze (sequence, one)
  same_sequence = Equal (sequence_column, sequence)
  mask = And (same_row, same_sequence)
  q_batch = Unsqueeze (q, zero)
  k_batch = Unsqueeze (k, zero)
  v_batch = Unsqueeze (v, zero)
  y = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @scale>
    (q_batch, k_batch, v_batch, mask)
  out = Squeeze (y, zero)
}}
""",
}
