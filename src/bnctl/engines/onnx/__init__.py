"""The ONNX engine, on onnx-ir; never imports torch."""
