"""The same questions to lm-evaluation-harness: its own task files over local data, on transformers or on any LM of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

SHIPPED = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "mmlu": ("mmlu/default/_default_template_yaml", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"),
    "arc": ("arc/arc_easy.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "validation"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "sst2": ("glue/sst2/default.yaml", "validation"),
}
"""Task files of the harness by our names, and the split that it asks."""


def write_task(folder: Path, name: str, rows: list[dict], **overrides) -> str:
    """A task of the harness over these rows, in `folder`; returns its name."""
    import lm_eval

    source, split = SHIPPED[name]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {f"{each}_split": None for each in ("training", "validation", "test")} | {f"{split}_split": split}
    content = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / source),
        "task": f"local_{name}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder / "cache")},
        "fewshot_split": split,
        **splits,
        **overrides,
    }
    (folder / f"local_{name}.yaml").write_text(json.dumps(content))
    return content["task"]


def evaluate(model, folder: Path, tasks: list[str], num_fewshot: int = 0, limit: int | None = None) -> dict:
    """`simple_evaluate` of the harness: "results" and, with every item, "samples"."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )


def hugging_face(path: Path, batch_size: int = 32):
    """The harness' own model: transformers on the CPU in float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=batch_size)


def hellaswag_rows(path: Path) -> list[dict]:
    """Rows of ctx and endings with the columns of the original set, from which the harness makes the same ctx."""
    rows = [json.loads(line) for line in path.open()]
    for row in rows:
        row["activity_label"], _, row["ctx_a"] = row["ctx"].partition(": ")
        row["ctx_b"] = ""
    return rows
