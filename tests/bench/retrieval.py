"""How often the passage that answers a question is among the first five: by words, and by an encoder trained here.

    python tests/bench/retrieval.py xquad-en-300.jsonl [more-texts.txt ...] [--steps 50] [--contrastive-steps 300]

The passages are the contexts of all questions, one file each in an index of `llmctl index`. The encoder, one layer of 128
whose states are averaged, is pretrained on the passages and the further texts by masked tokens; then once more so that a few
words in a row find the paragraph that they were taken from (the inverse cloze task, Lee et al. 2019, with the other
paragraphs of the batch as wrong answers; half of a batch are passages). No question is seen in training. Deeper encoders and
longer pretraining do worse on so little text: what counts here is which words are shared and which of them are rare.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from llmctl.embedding.embedder import pool
from llmctl.models.loading import load_model, save_model
from llmctl.retrieval.index import Index, update
from llmctl.tokenizer import Tokenizer

TEMPERATURE, KEPT, TOKENS, RATE = 0.05, 0.5, 256, 2e-3
SHAPE = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512}
CONFIG = {
    "model_type": "roberta",
    "vocab_size": 4096,
    "max_position_embeddings": TOKENS + 2,
    "type_vocab_size": 1,
    **SHAPE,
}


def llmctl(*words: object) -> None:
    run = subprocess.run([sys.executable, "-m", "llmctl", *map(str, words)], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"llmctl {' '.join(map(str, words))}\n{run.stderr}")


def recall(documents: Path, rows: list[dict], names: dict[str, str], model: Path | None) -> dict[str, float]:
    """Shares of questions whose passage is the first, or among five; and the mean of 1 / its place among ten."""
    update(documents, model, rebuild=True)
    index = Index.open(documents, model)
    places = []
    for row in rows:
        found = [passage.path for passage in index.search(row["question"], 10)]
        wanted = names[row["context"]]
        places.append(found.index(wanted) + 1 if wanted in found else None)
    n = len(rows)
    return {
        "recall@1": sum(place == 1 for place in places) / n,
        "recall@5": sum(place is not None and place <= 5 for place in places) / n,
        "MRR@10": sum(1 / place for place in places if place) / n,
    }


def pretrain(texts: list[Path], folder: Path, steps: int) -> Path:
    llmctl("tokenize", *texts, "--special-tokens", "encoder", "--vocab-size", 4096, "-o", folder / "corpus.arrow")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    how = ["--model-config", folder / "config.json", "--seq-len", TOKENS, "--batch-size", 16]
    llmctl("pretrain", folder / "corpus.arrow", *how, "--steps", steps, "-o", folder / "encoder")
    return folder / "encoder"


def paragraphs(texts: list[Path]) -> list[list[str]]:
    """Sentences of every paragraph that has three."""
    found = []
    for path in texts:
        for paragraph in re.split(r"\n\s*\n", path.read_text()):
            sentences = re.split(r"(?<=[.!?;:])\s+", " ".join(paragraph.split()))
            sentences = [sentence for sentence in sentences if len(sentence.split()) >= 4]
            found += [sentences] if len(sentences) >= 3 else []
    return found


def contrast(base: Path, texts: list[Path], folder: Path, steps: int, batch: int = 32) -> Path:
    """The encoder after so many batches of the inverse cloze task; the sentence stays in its paragraph half of the time."""
    model, tokenizer = load_model(base, torch.float32), Tokenizer.load(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    choose, passages, others = random.Random(0), paragraphs(texts[:1]), paragraphs(texts[1:])
    n_own = batch // 2 if others else batch

    def vectors(sentences: list[str]) -> torch.Tensor:
        ids = [tokenizer.encode(text) for text in sentences]
        ids = [row if len(row) <= TOKENS else [*row[: TOKENS - 1], row[-1]] for row in ids]
        inputs_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], True, tokenizer.pad_id)
        real_BT = torch.arange(inputs_BT.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        return F.normalize(pool(model.hidden(inputs_BT, real_BT), real_BT, "mean"), dim=-1)

    for _ in range(steps):
        asked, told = [], []
        for sentences in choose.sample(passages, n_own) + choose.sample(others, batch - n_own):
            at = choose.randrange(len(sentences))
            words = sentences[at].split()
            begin = choose.randrange(max(1, len(words) - 8))
            asked.append(" ".join(words[begin : begin + choose.randint(4, 12)]))
            told.append(" ".join(sentences if choose.random() < KEPT else sentences[:at] + sentences[at + 1 :]))
        scores_BB = vectors(asked) @ vectors(told).T / TEMPERATURE
        loss = F.cross_entropy(scores_BB, torch.arange(batch)) + F.cross_entropy(scores_BB.T, torch.arange(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--steps", type=int, default=50, help="of pretraining")
    parser.add_argument("--contrastive-steps", type=int, default=300)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    names = {context: f"{number:03d}.txt" for number, context in enumerate(contexts)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "documents").mkdir()
        (folder / "tuned").mkdir()
        for context, file in names.items():
            (folder / "documents" / file).write_text(context.replace("\n", " ") + "\n")
        (folder / "passages.txt").write_text("\n\n".join(contexts))
        texts = [folder / "passages.txt", *args.texts]
        print(
            f"{len(rows)} questions, {len(contexts)} passages; five at random hold the right one in {5 / len(contexts):.3f}"
        )
        models = {"BM25": lambda: None}
        models["encoder, masked tokens"] = lambda: pretrain(texts, folder, args.steps)
        models["and inverse cloze"] = lambda: contrast(
            folder / "encoder", texts, folder / "tuned", args.contrastive_steps
        )
        print("| by | recall@1 | recall@5 | MRR@10 | seconds to train |\n| --- | --- | --- | --- | --- |")
        for label, make in models.items():
            began = time.monotonic()
            model = make()
            seconds = time.monotonic() - began
            found = recall(folder / "documents", rows, names, model)
            print(f"| {label} | {' | '.join(f'{value:.3f}' for value in found.values())} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
