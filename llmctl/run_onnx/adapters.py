"""LoRA adapters as inputs of an exported graph.

Of each module that may be adapted a graph has two inputs that need not be given, NAME.lora_A [in, rank] and NAME.lora_B
[rank, out], where NAME is the module's in llmctl (layers.0.mixer.q_proj): x lora_A lora_B is added to what the module gives.
Left out they have the rank 0. The scaling is in lora_B; the ranks of several adapters stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime
import torch

from llmctl import checkpoint
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune import adapter, methods
from llmctl.finetune.lora import LoraLinear
from llmctl.finetune.sites import adapted
from llmctl.models.config import ModelConfig
from llmctl.models.loading import new_empty
from llmctl.run_onnx.model import OnnxModule

Adapters = Sequence[tuple[Path, float]]


def input_names(module: str) -> tuple[str, str]:
    return f"{module}.lora_A", f"{module}.lora_B"


def modules(config: ModelConfig, adapters: Adapters) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [in, rank] and B [rank, out] of each module that an adapter changes, float32, by the module's name.

    Raises UserError for an adapter that is more than products beside matrices.
    """
    with torch.device("meta"):
        model = new_empty(config)
    for path, weight in adapters:
        if not _is_plain(path):
            raise UserError(
                f"{path}: only plain LoRA of linear layers can be a graph's input, without DoRA, embeddings and whole modules",
                hint="fold it in: export-onnx --adapter without --adapter-inputs",
            )
        adapter.load(model, path, weight)
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, module in adapted(model, LoraLinear):
        product = module.lora_A.detach().mT, (module.scaling * module.lora_B.detach()).mT
        found.setdefault(name, []).append(product)
    return {
        name: (torch.cat([A for A, _ in products], 1).contiguous(), torch.cat([B for _, B in products]).contiguous())
        for name, products in found.items()
    }


def _is_plain(path: Path) -> bool:
    """Whether base(x) + x A B of linear layers says all of it."""
    method, stored = methods.from_peft(adapter.read_config(path)), checkpoint.open_tensors(path, stem=adapter.STEM)
    own = all(adapter.is_adapters(name) and ".lora_embedding" not in name for name in stored)
    return isinstance(method, methods.Lora) and not method.dora and own


def inputs(config: ModelConfig, adapters: Adapters) -> dict[str, torch.Tensor]:
    """The same by the names of the inputs."""
    return {
        name: tensor
        for module, product in modules(config, adapters).items()
        for name, tensor in zip(input_names(module), product)
    }


def write(file: Path, given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """A file in onnxruntime's own format of adapters (`LoraAdapter`), in the dtype of the graph."""
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    held = {name: tensor.to(dtype) for name, tensor in given.items()}  # onnxruntime copies nothing before it writes
    made.set_parameters({name: _value(tensor) for name, tensor in held.items()})
    made.export_adapter(str(file))


def _value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    if tensor.dtype == torch.bfloat16:  # which numpy does not know
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def give(model: OnnxModule, adapters: Adapters) -> None:
    """Let the adapters count in all that the model computes from now on. Raises UserError where the graph has no place for them."""
    graph = model.graph
    if not graph.optional:
        raise CalledWrongly(
            f"{graph.path.parent}: an exported model takes no adapters",
            hint="export-onnx --adapter has them, and with --adapter-inputs it can take others",
        )
    given = inputs(model.config, adapters)
    if missing := [name for name in given if name not in graph.optional]:
        raise UserError(
            f"{graph.path.parent}: has no input {missing[0]} ({len(missing)} of the adapter's {len(given)} are missing)",
            hint="export it with an --adapter that changes the same modules",
        )
    graph.give(given)
