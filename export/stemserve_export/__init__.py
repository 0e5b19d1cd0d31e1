"""Exports published separators to ONNX for a Triton model repository."""
