"""What llama.cpp makes of GGUF files: run with a Python that has llama-cpp-python.

Standard input: JSON Lines {"file", "text" or "ids", "count", "context"}, or {"file", "source": ids, "count"} of an encoder-decoder;
standard output: for each {"prompt": ids, "greedy": ids}, or {"error"}.
"""

import json
import os
import sys

import llama_cpp
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama


def decoded(model: Llama, source: list[int], count: int) -> list[int]:
    """What the decoder writes of a source, greedily, without an end."""

    def run(step, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # which the batch only points to
        if step(model.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"{step.__name__} failed")

    run(llama_cpp.llama_encode, source)
    written = [llama_cpp.llama_model_decoder_start_token(model.model)]
    while len(written) <= count:
        run(llama_cpp.llama_decode, written[-1:])
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        written.append(int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax()))
    return written[1:]


answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the library writes where it likes
for line in sys.stdin:
    row = json.loads(line)
    try:
        if "embed" in row:
            model = Llama(row["file"], embedding=True, n_ctx=0, verbose=False)
            ids = model.tokenize(row["embed"].encode(), add_bos=True, special=True)
            print(json.dumps({"prompt": ids, "vector": model.embed(row["embed"])}), file=answers, flush=True)
            continue
        model = Llama(
            row["file"],
            n_ctx=row.get("context", 0),
            n_batch=512,
            n_threads=1,
            verbose=False,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
        )
        if "source" in row:
            greedy = decoded(model, row["source"], row["count"])
            print(json.dumps({"prompt": row["source"], "greedy": greedy}), file=answers, flush=True)
            model.close()
            continue
        prompt = row["ids"] if "ids" in row else model.tokenize(row["text"].encode(), add_bos=True, special=True)
        greedy = []
        model.reset()
        for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            greedy.append(token)
            if len(greedy) >= row["count"]:
                break
        answer = {"prompt": prompt, "greedy": greedy}
        model.close()
    except (ValueError, RuntimeError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
