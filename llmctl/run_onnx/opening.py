"""A directory with ONNX files as a model."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path

import onnxruntime
import torch

from llmctl.errors import CalledWrongly, UserError
from llmctl.models.loading import read_config
from llmctl.run_onnx.adapters import Adapters, give
from llmctl.run_onnx.causal import OnnxCausalLM
from llmctl.run_onnx.files import DECODER, ENCODER, FOLLOWING, MERGED, SINGLE
from llmctl.run_onnx.graph_session import GraphSession, provider_name
from llmctl.run_onnx.masked import OnnxMaskedLM
from llmctl.run_onnx.seq2seq import Decoders, OnnxSeq2SeqLM

OnnxModel = OnnxCausalLM | OnnxMaskedLM | OnnxSeq2SeqLM
PADS = "llmctl.pads"
"""Key of a file's metadata: on which side of a batch's rows padding stands."""


def open_model(
    path: str | Path,
    provider: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    options: onnxruntime.SessionOptions | None = None,
    adapters: Adapters = (),
) -> OnnxModel:
    """`provider` is cpu, cuda or onnxruntime's own name for one; by default what suits the device.

    Raises UserError for a provider that is not there, for files that are missing or cannot be run, and for adapters that the
    graph has no inputs for.
    """
    model = _opened(path, provider, device, dtype, options)
    if adapters:
        give(model, adapters)
    return model


def _opened(path, provider, device, dtype, options) -> OnnxModel:
    path, config = Path(path), read_config(path)
    if dtype is not None:
        raise CalledWrongly(f"{path}: an exported model computes in the dtype of its files; --dtype does not apply")
    name = provider_name(provider, device)

    def session(file: str) -> GraphSession:
        if not (path / file).exists():
            raise UserError(f"{path}: has no {file}", hint="export it again with llmctl export-onnx")
        return GraphSession(path / file, name, options)

    if config.encoder is not None:
        encoder = session(ENCODER)
        if (path / MERGED).exists() and not (path / DECODER).exists():
            both = session(MERGED)
            return OnnxSeq2SeqLM(encoder, Decoders(both, both), config)
        return OnnxSeq2SeqLM(encoder, Decoders(session(DECODER), session(FOLLOWING)), config)
    graph = session(SINGLE)
    if "logits" not in graph.outputs:
        config = dataclasses.replace(config, head=None)
    if config.kind == "masked":
        return OnnxMaskedLM(graph, config)
    shares = _has_operator(path / SINGLE, b"GroupQueryAttention")
    pads_right = graph.metadata.get(PADS, "right" if shares else "left") == "right"
    return OnnxCausalLM(graph, config, pads_right, shares)


def _has_operator(file: Path, name: bytes) -> bool:
    """Whether a node of that kind is in the file; names of nodes stand in it as they are."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0
