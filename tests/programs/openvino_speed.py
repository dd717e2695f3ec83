"""How fast OpenVINO GenAI runs a model: run with a Python that has openvino-genai.

    python openvino_speed.py MODEL PROMPT NEW THREADS ROUNDS

MODEL is a .gguf file or a directory of OpenVINO's own files. Prints a line of JSON: {"prompt": tokens/s, "decode": tokens/s,
"decode_8": tokens/s of eight texts together}, medians of the rounds.
"""

import sys
import time

import numpy as np
import openvino
import openvino_genai
from rates import print_medians


def run(pipeline, batch, n_prompt, n_new):
    """Seconds to the first token, and for each that follows."""
    ids = 1 + (np.arange(batch)[:, None] * 7 + np.arange(n_prompt)) % 250
    inputs = openvino_genai.TokenizedInputs(
        openvino.Tensor(ids.astype(np.int64)), openvino.Tensor(np.ones_like(ids, dtype=np.int64))
    )
    config = openvino_genai.GenerationConfig(do_sample=False, ignore_eos=True)
    config.max_new_tokens = config.min_new_tokens = n_new
    start = time.perf_counter()
    metrics = pipeline.generate(inputs, config).perf_metrics
    seconds, first = time.perf_counter() - start, metrics.get_ttft().mean / 1e3
    return first, (seconds - first) / (n_new - 1)  # its own time for each token counts every text's


def main():
    path, *numbers = sys.argv[1:]
    n_prompt, n_new, n_threads, n_rounds = map(int, numbers)
    pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=n_threads)
    print_medians(lambda batch: run(pipeline, batch, n_prompt, n_new), n_prompt, n_rounds)


main()
