"""An adapter on disk: a PEFT directory, attached to a model, read and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from llmctl import checkpoint, files
from llmctl.errors import CalledWrongly, UserError, did_you_mean
from llmctl.finetune import bottleneck, ia3, lora, lora_files, methods, soft_prompt
from llmctl.finetune.sites import find_sites, plain_name
from llmctl.finetune.untying import untie
from llmctl.models import config_classifier, families, weights
from llmctl.models.config import Classifier, ModelConfig
from llmctl.models.loading import usual_classifier

PREFIX = "base_model.model."
STEM = "adapter_model"
LABELS = "classifier.json"
"""Beside the adapter of a classifier: the keys that a classifier's config.json has of its labels."""
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None}


def attach(model: nn.Module, method: methods.Method, seed: int = 0) -> None:
    """Freeze the model and give it the method's fresh parameters, which alone are trained, with a classifier's head."""
    model.requires_grad_(False)
    if isinstance(method, methods.Lora):
        lora.attach(model, method, seed)
        _unfreeze(model, method.modules_to_save)
    elif isinstance(method, methods.Ia3):
        ia3.attach(model, method)
    elif isinstance(method, methods.Bottleneck):
        bottleneck.attach(model, method, seed)
    else:
        soft_prompt.attach(model, method, seed)
    _train(model, {name for _, ours, _ in _head_rows(model) for name in ours})


def save(model: nn.Module, method: methods.Method, directory: str | Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing directory.

    `base` is the path or name of the model under the adapter; PEFT's readers look there.
    """
    tensors, said = _to_peft(model, method)
    head = _head_rows(model)
    tensors |= _tensors_of(model, head)
    config = {
        **_with_modules(said.to_peft(), _head_modules(head)),
        "base_model_name_or_path": base,
        "task_type": "SEQ_CLS" if model.config.classifier else TASKS[model.config.kind],
        "inference_mode": True,
        "fan_in_fan_out": any(site.transposed for site in find_sites(model)),
    }
    named = {_stored_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    checkpoint.save_tensors(directory, named, stem=STEM)
    files.write_atomic(Path(directory) / "adapter_config.json", f"{json.dumps(config, indent=2)}\n".encode())
    if model.config.classifier:
        text = json.dumps(config_classifier.labels_to_hf(model.config.classifier), indent=2, ensure_ascii=False)
        files.write_atomic(Path(directory) / LABELS, f"{text}\n".encode())


def load(model: nn.Module, directory: str | Path, weight: float = 1.0) -> methods.Method:
    """Attach the adapter of a PEFT directory, ours or anybody's, so that it counts `weight` times.

    Raises UserError where it does not fit the model, or is of a kind that can only count once.
    """
    method = methods.from_peft(read_config(directory))
    try:
        _attach_stored(model, method, directory, weight)
    except UserError as error:
        raise UserError(f"{directory}: {error.message}", error.hint) from error
    return method


def _attach_stored(model: nn.Module, method: methods.Method, directory: str | Path, weight: float) -> None:
    if weight != 1.0 and not (isinstance(method, methods.Lora) and not method.dora and not method.modules_to_save):
        raise UserError(f"only plain LoRA can be weighted, and this weight is {weight:g}")
    stored = checkpoint.open_tensors(directory, stem=STEM)
    tensors = {name.removeprefix(PREFIX): stored.get(name) for name in stored.keys()}
    own = {name: tensor for name, tensor in tensors.items() if is_adapters(name)}
    if isinstance(method, methods.Lora):
        lora_files.from_peft(model, method, own, weight)
    elif isinstance(method, methods.Ia3):
        ia3.from_peft(model, own)
    elif isinstance(method, methods.Bottleneck):
        bottleneck.from_tensors(model, method, own)
    else:
        soft_prompt.from_peft(model, method, own)
    _load_whole(model, {name: tensor for name, tensor in tensors.items() if name not in own})


def classifier_of(directory: str | Path, config: ModelConfig) -> Classifier | None:
    """The head that an adapter brings for a base of this config; None where it brings none.

    PEFT says nothing of the labels, so they have numbers for names there.
    """
    said = read_config(directory)
    if said.get("task_type") != "SEQ_CLS":
        return None
    if (Path(directory) / LABELS).exists():
        return config_classifier.from_hf(files.read_json(Path(directory) / LABELS), usual_classifier(config))
    stored = checkpoint.open_tensors(directory, stem=STEM)
    rows = [row.theirs for row in families.find(config.family).WEIGHTS if row.ours[0] == "classifier.out.weight"]
    counts = [stored.shape(name)[0] for name in stored.keys() if name.removeprefix(PREFIX) in rows]
    pad_id = {"pad_token_id": config.hf.get("pad_token_id")}
    return config_classifier.from_hf({"num_labels": counts[0], **pad_id}, usual_classifier(config)) if counts else None


def is_adapter(directory: str | Path) -> bool:
    """Whether it holds an adapter and no model."""
    return Path(directory, "adapter_config.json").exists() and not Path(directory, "config.json").exists()


def refuse_as_base(directory: str | Path) -> None:
    """Raise UserError for an adapter where a whole model is wanted."""
    if is_adapter(directory):
        base = read_config(directory).get("base_model_name_or_path")
        raise UserError(
            f"{directory}: an adapter of {base}, and no model of its own",
            hint=f"llmctl merge-lora {base} {directory} -o MERGED makes one of the two",
        )


def read_config(directory: str | Path) -> dict:
    """The content of adapter_config.json. Raises UserError where the directory holds no adapter."""
    file = Path(directory) / "adapter_config.json"
    if not file.exists():
        raise UserError(f"{directory}: has no adapter_config.json", hint="an adapter is a directory as PEFT writes it")
    return files.read_json(file)


def _to_peft(model: nn.Module, method: methods.Method) -> tuple[dict[str, torch.Tensor], methods.Method]:
    if isinstance(method, methods.Lora):
        tensors, said = lora_files.to_peft(model, method)
        whole = _whole_tensors(model, _beside_head(model, method.modules_to_save))
        if model.config.predicts_tokens and model.config.tie_embeddings:
            embedding, head = tied_names(model.config)
            if embedding in whole:  # PEFT parts the two
                whole[head] = whole[embedding]
        # whole names: PEFT takes "norm" for every module whose name ends in these letters
        modules = sorted({name.rpartition(".")[0] for name in whole})
        return tensors | whole, dataclasses.replace(said, modules_to_save=tuple(modules))
    if isinstance(method, methods.Ia3):
        return ia3.to_peft(model, method)
    if isinstance(method, methods.Bottleneck):
        return bottleneck.to_tensors(model), method
    return soft_prompt.to_peft(model, method), method


def _stored_name(name: str) -> str:
    return name if name == soft_prompt.NAME else f"{PREFIX}{name}"


def is_adapters(name: str) -> bool:
    """Whether a tensor of an adapter's file is the adapter's own, and not a whole tensor of the base that it replaces."""
    parts = (".lora_", ".ia3_l", ".down.", ".up.", soft_prompt.NAME)
    return any(part in name for part in parts)


def _whole_rows(model: nn.Module, modules: tuple[str, ...]):
    """(their name, our names, change) of every tensor in the modules of these names, ours or Hugging Face's."""
    shapes = {plain_name(name): parameter.shape for name, parameter in model.named_parameters()}
    rows = list(weights.matches(families.find(model.config.family).WEIGHTS, shapes))
    for wanted in modules:
        found = [row for row in rows if any(_ends_with(name, wanted) for name in (row[0], *row[1]))]
        if not found:
            leaves = {row[0].rpartition(".")[0].rpartition(".")[2] for row in rows}
            near = did_you_mean(wanted, leaves) or f"there are {', '.join(sorted(leaves))}"
            raise CalledWrongly(f"--modules-to-save: the model has no module {wanted!r}", near)
        yield from found


def _ends_with(parameter_name: str, module: str) -> bool:
    path = parameter_name.rpartition(".")[0]
    return path == module or path.endswith(f".{module}")


def _unfreeze(model: nn.Module, modules: tuple[str, ...]) -> None:
    """Train these modules whole: their parameters go into the adapter as they are."""
    wanted = {name for _, ours, _ in _whole_rows(model, modules) for name in ours}
    _train(model, wanted)
    if any("embed_" in name for name in wanted):  # norms of what float32 embeddings begin must be of that dtype, too
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.float()


def _train(model: nn.Module, wanted: set[str]) -> None:
    """Let these parameters of the model learn, in float32 whatever the others are."""
    for name, parameter in model.named_parameters():
        if plain_name(name) in wanted:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _head_rows(model: nn.Module) -> list[tuple[str, list[str], str]]:
    """(their name, our names, change) of every tensor of a classifier's head."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name.startswith("classifier.")}
    return list(weights.matches(families.find(model.config.family).WEIGHTS, shapes))


def _head_modules(rows) -> list[str]:
    """Their modules, none inside another: PEFT's SEQ_CLS saves `score` and `classifier` whole."""
    modules = {row[0].rpartition(".")[0] for row in rows}
    whole = ("classifier", "classification_head")
    return sorted({next((head for head in whole if name.startswith(f"{head}.")), name) for name in modules})


def _beside_head(model: nn.Module, modules: tuple[str, ...]) -> tuple[str, ...]:
    """PEFT's files name both spellings of a head, whichever the model has."""
    head = _head_modules(_head_rows(model))
    return tuple(name for name in modules if not (head and name in (*head, "score", "classifier")))


def _with_modules(config: dict, head: list[str]) -> dict:
    """An adapter_config.json with the head among the modules that are saved whole, where the method has such."""
    if not head or "modules_to_save" not in config:
        return config
    return {**config, "modules_to_save": [*(config["modules_to_save"] or ()), *head]}


def tied_names(config: ModelConfig) -> tuple[str, str]:
    """Of an embedding and of a head that is the same matrix, in the files of the family."""
    rows = {row.ours[0]: row.theirs for row in families.find(config.family).WEIGHTS}
    return rows["embed_tokens.weight"], rows.get("lm_head.weight", "lm_head.weight")


def _whole_tensors(model: nn.Module, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return _tensors_of(model, _whole_rows(model, modules))


def _tensors_of(model: nn.Module, rows) -> dict[str, torch.Tensor]:
    parameters = {plain_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    return {theirs: weights.to_theirs(change, [parameters[name] for name in ours]) for theirs, ours, change in rows}


@torch.no_grad()
def _load_whole(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    tensors = dict(tensors)
    if model.config.predicts_tokens and model.config.tie_embeddings:
        embedding, head = tied_names(model.config)
        if embedding in tensors and head in tensors and torch.equal(tensors[embedding], tensors[head]):
            del tensors[head]
        elif embedding in tensors or head in tensors:  # PEFT's head keeps the matrix that the embedding had
            untie(model)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    left = dict(tensors)
    for theirs, ours, change in weights.matches(families.find(model.config.family).WEIGHTS, shapes):
        if theirs in left:
            parts = weights.to_ours(change, left.pop(theirs), [shapes[name][0] for name in ours])
            for name, part in zip(ours, parts, strict=True):
                parameters[name].data = part.to(parameters[name].dtype)
    unknown = [name for name in left if ".base_layer." not in name]
    if unknown:
        raise UserError(f"the adapter has {unknown[0]}, which this model does not have")
