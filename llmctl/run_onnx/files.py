"""The files of an exported model, under the names that optimum gives them. No onnxruntime here."""

from __future__ import annotations

from pathlib import Path

SINGLE, ENCODER = "model.onnx", "encoder_model.onnx"
DECODER, FOLLOWING, MERGED = "decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx"


def is_exported(path: str | Path) -> bool:
    """Whether a directory holds an exported model, rather than a checkpoint."""
    return not any(Path(path).glob("*.safetensors")) and any((Path(path) / name).exists() for name in (SINGLE, ENCODER))
