"""ONNX models as torch modules whose 2:4 weights run on sparse tensor cores, and densely where there are none."""
