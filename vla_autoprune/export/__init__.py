"""From a transformers model to a bundle: stages as torch modules, ONNX files, parity."""
