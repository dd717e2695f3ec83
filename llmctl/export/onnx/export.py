"""`llmctl export-onnx`: from a checkpoint to a directory that onnxruntime runs, checked before it takes its name."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmctl import allocator, files, lineage
from llmctl.embedding.embedder import usual_pooling
from llmctl.errors import CalledWrongly, UserError
from llmctl.export.onnx import causal, check, genai, masked, seq2seq, support, writing
from llmctl.export.onnx.attention import groups_queries
from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import Graph
from llmctl.export.onnx.linear import FEW_BITS
from llmctl.export.onnx.quantization import Quantization
from llmctl.export.onnx.settings import OnnxSettings
from llmctl.export.onnx.weights import Weights
from llmctl.finetune.assembly import Assembly
from llmctl.finetune.merge import merge
from llmctl.finetune.merge_settings import MergeSettings
from llmctl.generation.settings import read_generation_config, read_marks
from llmctl.models.config import ModelConfig, Recurrent
from llmctl.models.loading import read_config, stored_config, write_config
from llmctl.quantize.stored import CONFIG_KEY
from llmctl.run_onnx import adapters
from llmctl.run_onnx.files import DECODER, ENCODER, FOLLOWING, MERGED, SINGLE
from llmctl.run_onnx.opening import PADS
from llmctl.tokenization.files import has_tokenizer
from llmctl.tokenizer import Tokenizer

log = logging.getLogger("llmctl")
Build = Callable[[Builder], None]


@dataclass(frozen=True)
class Exported:
    path: Path
    opset: int
    checked: check.Checked


def export(model: str | Path, output: str | Path, settings: OnnxSettings) -> Exported:
    """Write MODEL, with its adapters folded in or as inputs, as ONNX files with everything that runs them.

    Raises UserError or CalledWrongly, before any work, for what has no ONNX form or cannot run here, and CheckFailed where
    the result does not compute what the model does; nothing is left under `output` then.
    """
    assembly = Assembly.find(model, settings.adapter, settings.force)
    provider = support.refuse(read_config(assembly.base), settings, len(assembly.adapters))
    files.refuse_existing(output, settings.overwrite)
    files.refuse_input(output, [assembly.base, *(path for path, _ in assembly.adapters)])
    beside = assembly.adapters if settings.adapter_inputs else ()
    adapter_files = _adapter_files(beside)
    allocator.return_freed_memory()
    with files.staged_directory(output, settings.overwrite) as directory:
        source = assembly.base if settings.adapter_inputs else _merged(assembly, directory / "merged", settings)
        spec = stored_config(source)
        adapted = frozenset(adapters.modules(spec, beside))
        tokenizer = assembly.tokenizer() if has_tokenizer(assembly.base) else None
        few_bits = _write_graphs(source, directory, spec, settings, adapted)
        _write_companions(assembly, directory, spec, tokenizer, settings)
        _write_adapters(spec, adapter_files, directory, settings.dtype)
        checked = check.check(source, directory, provider, tokenizer, settings, few_bits)
        for each in beside:
            check.check(source, directory, provider, tokenizer, settings, few_bits, [each])
        shutil.rmtree(directory / "merged", ignore_errors=True)
        record = lineage.Lineage(
            command="export-onnx",
            recipe={
                "model": str(assembly.base),
                "adapters": [str(path) for path, _ in assembly.adapters],
                **vars(settings),
            },
            tokenizer_sha256=None if tokenizer is None else tokenizer.sha256,
            parent_sha256=lineage.weights_sha256(assembly.base),
            metrics=checked.as_dict(),
        )
        lineage.write(directory, record)
    return Exported(Path(output), settings.opset, checked)


def _merged(assembly: Assembly, place: Path, settings: OnnxSettings) -> Path:
    """The checkpoint with its adapters folded in, where it has any."""
    if not assembly.adapters:
        return assembly.base
    weights = ",".join(str(weight) for _, weight in assembly.adapters)
    merge(
        assembly.base,
        [path for path, _ in assembly.adapters],
        place,
        MergeSettings(weights=weights, force=settings.force),
    )
    return place


def _adapter_files(beside: adapters.Adapters) -> dict[str, tuple[Path, float]]:
    """The names of their files."""
    named = {f"{path.absolute().name}.onnx_adapter": (path, weight) for path, weight in beside}
    if len(named) < len(beside):
        names = [path.absolute().name for path, _ in beside]
        twice = next(name for name in names if names.count(name) > 1)
        raise CalledWrongly(f"--adapter: two adapters are called {twice}", hint="rename one of the directories")
    return named


def _write_adapters(spec: ModelConfig, named: dict[str, tuple[Path, float]], directory: Path, dtype: str) -> None:
    """Each as a file that onnxruntime and onnxruntime-genai load beside the graph."""
    for name, each in named.items():
        (directory / "adapters").mkdir(exist_ok=True)
        adapters.write(directory / "adapters" / name, adapters.inputs(spec, [each]), getattr(torch, dtype))


def _write_graphs(
    source: Path, directory: Path, spec: ModelConfig, settings: OnnxSettings, adapted: frozenset[str]
) -> bool:
    """Whether there are products with matrices of few bits in them."""
    dtype = getattr(torch, settings.dtype)
    weights = Weights(source, spec, dtype)
    bits = {"int4": 4, "int8": 8}.get(settings.quantize)
    quantization = None if bits is None else Quantization(bits, settings.group_size)
    graphs: dict[str, Graph] = {}
    for name, build in _plans(source, spec, settings):
        b = Builder(Graph(dtype), weights, settings.fuse, quantization=quantization, adapted=adapted)
        build(b)
        graphs[name] = b.graph
        inputs = {place.name for place in b.graph.inputs}
        if lacking := [name for name in adapted if adapters.input_names(name)[0] not in inputs]:
            raise UserError(
                f"--adapter-inputs: {sorted(lacking)[0]} cannot have an adapter as inputs ({len(lacking)} such modules)",
                hint="without --adapter-inputs it is folded in",
            )
    files.check_free_space(directory, sum(writing.weight_bytes(graph) for graph in graphs.values()))
    metadata = {PADS: "right" if _pads_right(spec, settings.fuse) else "left"}
    for name, graph in graphs.items():
        writing.write(graph, directory / name, settings.opset, metadata, settings.external_data_above)
    return any(node.op_type == FEW_BITS for graph in graphs.values() for node in graph.nodes)


def _plans(source: Path, spec: ModelConfig, settings: OnnxSettings) -> Iterator[tuple[str, Build]]:
    """The files, and what builds each."""
    if spec.encoder is not None:
        yield ENCODER, lambda b: seq2seq.build_encoder(b, spec)
        passes: Sequence[tuple[str, seq2seq.Pass]] = ((DECODER, "first"), (FOLLOWING, "next"))
        for name, which in ((MERGED, "either"),) if settings.merged_decoder else passes:
            yield name, lambda b, which=which: seq2seq.build_decoder(b, spec, which)
    elif spec.kind == "causal":
        yield SINGLE, lambda b: causal.build(b, spec)
    else:
        pooling = usual_pooling(source, spec) if settings.pooling == "auto" else settings.pooling
        yield SINGLE, lambda b: masked.build(b, spec, pooling)


def _pads_right(spec: ModelConfig, fuse: bool) -> bool:
    return causal.pads_right(spec, fuse and spec.kind == "causal" and groups_queries(spec))


def _write_companions(
    assembly: Assembly, directory: Path, spec: ModelConfig, tokenizer: Tokenizer | None, settings: OnnxSettings
) -> None:
    """Config, tokenizer and settings of generation, for us, optimum and onnxruntime-genai."""
    plain = dataclasses.replace(spec, hf={key: value for key, value in spec.hf.items() if key != CONFIG_KEY})
    write_config(plain, getattr(torch, settings.dtype), directory)
    recommended = read_generation_config(assembly.generation_config_directory)
    if recommended:
        shutil.copyfile(
            assembly.generation_config_directory / "generation_config.json", directory / "generation_config.json"
        )
    if tokenizer is None:
        return
    tokenizer.save(directory)
    if spec.kind != "causal" or spec.classifier is not None or isinstance(spec.block(0).mixer, Recurrent):
        return  # onnxruntime-genai runs decoders with keys and values
    if problem := genai.unreadable(tokenizer):
        log.warning("no genai_config.json: onnxruntime-genai cannot read the tokenizer: %s", problem)
        return
    marks = read_marks(recommended, spec.hf, tokenizer.eos_id)
    content = genai.genai_config(spec, tokenizer, marks, settings.fuse, recommended)
    files.write_atomic(directory / "genai_config.json", (json.dumps(content, indent=2) + "\n").encode())
