"""Exported models on onnxruntime, with the interfaces that generation and embedding ask of a model."""
