"""Quantized models as plain modules: linears that hold codes, rotations fused into weights, and the files of both."""
