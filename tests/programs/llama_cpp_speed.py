"""How fast llama.cpp runs a Llama of random weights: run with a Python that has llama-cpp-python and gguf.

    python llama_cpp_speed.py DIRECTORY TYPE LAYERS PROMPT NEW THREADS ROUNDS

TYPE is Q4_0 or Q8_0; the other sizes are those of a 1.1B model. Prints a line of JSON: {"prompt": tokens/s, "decode": tokens/s},
medians of the rounds.
"""

import json
import os
import statistics
import sys
import time

import gguf
import numpy as np
from llama_cpp import Llama

WIDTH, HEADS, KV_WIDTH, FF, VOCABULARY = 2048, 32, 256, 5632, 32000


def random_tensor(kind, n_out, n_in):
    """Blocks of 32 weights: a scale in float16, then their codes."""
    n_bytes = {"Q4_0": 18, "Q8_0": 34}[kind]
    blocks = np.random.randint(0, 256, (n_out, n_in // 32, n_bytes), dtype=np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(0.02 / (8 if kind == "Q4_0" else 128)).tobytes(), dtype=np.uint8)
    return blocks.reshape(n_out, -1)


def write(path, kind, n_layers):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS * KV_WIDTH // WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    matrices = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    norms = ["output_norm"]
    for i in range(n_layers):
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
        shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (KV_WIDTH, WIDTH), "attn_v": (KV_WIDTH, WIDTH)}
        shapes |= {
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FF, WIDTH),
            "ffn_up": (FF, WIDTH),
            "ffn_down": (WIDTH, FF),
        }
        matrices |= {f"blk.{i}.{name}": shape for name, shape in shapes.items()}
    for name, shape in matrices.items():
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", random_tensor(kind, *shape), raw_dtype=raw)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds(model, ids):
    start = time.perf_counter()
    model.eval(ids)
    return time.perf_counter() - start


def main():
    directory, kind, *numbers = sys.argv[1:]
    n_layers, n_prompt, n_new, n_threads, n_rounds = map(int, numbers)
    path = os.path.join(directory, f"random-{kind}-{n_layers}.gguf")
    if not os.path.exists(path):
        write(path, kind, n_layers)
    model = Llama(
        path, n_ctx=n_prompt + n_new + 8, n_batch=512, n_threads=n_threads, n_threads_batch=n_threads, verbose=False
    )
    rates = {"prompt": [], "decode": []}
    for _ in range(n_rounds + 1):
        model.reset()
        rates["prompt"].append(n_prompt / seconds(model, [1 + i % 31000 for i in range(n_prompt)]))
        rates["decode"].append(1 / statistics.median(seconds(model, [5 + i]) for i in range(n_new)))
    print(json.dumps({name: statistics.median(values[1:]) for name, values in rates.items()}))


main()
