"""A saved head, its backbone and its preprocessing as one ONNX file that runs without featprobe."""
