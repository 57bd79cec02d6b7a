"""Into TensorRT engines."""
