"""Into an ONNX file that ONNX Runtime runs without Thresher."""
