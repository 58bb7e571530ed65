"""Arithmetic on parameters and statistics in float64; imports neither torch nor onnxruntime."""
