"""What cannot be exported, said before any work is done."""

from __future__ import annotations

import onnx
import onnxruntime
from onnx import helper

from llmctl.errors import CalledWrongly, UserError
from llmctl.export.onnx.settings import OnnxSettings
from llmctl.export.onnx.writing import IR_VERSION
from llmctl.models import config
from llmctl.run_onnx.graph_session import provider_name

OLDEST_OPSET = 20
"""Has Gelu, the last operator to come that graphs here use."""
_REASONS = {
    config.Mamba: "ONNX has no operator for a selective scan, and its Scan loop runs a graph for each token and layer",
    config.Mamba2: "ONNX has no operator for a state space's scan, and its Scan loop runs a graph for each token and layer",
    config.LocalAttention: "ONNX has no attention within a window and between chosen tokens; a dense one takes the memory "
    "that Longformer is there to save",
}


def refuse(spec: config.ModelConfig, settings: OnnxSettings, n_adapters: int = 0) -> str:
    """Raise UserError or CalledWrongly for what has no ONNX form, or cannot be checked here; the provider's full name."""
    for stack in filter(None, (spec, spec.encoder)):
        for layer in range(stack.n_layers):
            mixer = stack.block(layer).mixer
            if reason := _REASONS.get(type(mixer)):
                raise UserError(
                    f"{spec.family} cannot be exported to ONNX: layer {layer} is {type(mixer).__name__}", reason
                )
    if settings.merged_decoder and spec.encoder is None:
        raise CalledWrongly(f"--merged-decoder: {spec.family} is no encoder-decoder")
    if settings.adapter_inputs and not n_adapters:
        raise CalledWrongly(
            "--adapter-inputs: which modules have such inputs is what an adapter says", "--adapter PATH"
        )
    if settings.adapter_inputs and spec.encoder is not None:
        raise CalledWrongly("--adapter-inputs: the graphs of an encoder-decoder have none; --adapter is folded in")
    if settings.group_size & (settings.group_size - 1):
        raise CalledWrongly(f"--group-size {settings.group_size}: expected a power of 2")
    provider = provider_name(settings.provider)
    if settings.dtype == "bfloat16" and provider == "CPUExecutionProvider":
        raise CalledWrongly(
            "--dtype bfloat16: onnxruntime's CPU provider does not compute in it, so the result could not be checked",
            hint="--provider cuda where there is a GPU, or float16",
        )
    _refuse_opset(settings.opset, provider)
    return provider


def _refuse_opset(opset: int, provider: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest or not _runs(opset, provider):
        while newest > OLDEST_OPSET and not _runs(newest, provider):
            newest -= 1
        raise CalledWrongly(f"--opset {opset}: expected {OLDEST_OPSET} to {newest}, the newest of onnxruntime here")


def _runs(opset: int, provider: str) -> bool:
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception:  # noqa: BLE001 - onnxruntime has classes of its own for each of its status codes
        return False
    return True
