"""Intervals and tests for measurements; imports neither torch nor onnxruntime."""
