"""How fast onnxruntime-genai runs a model: run with a Python that has it.

    python genai_speed.py DIRECTORY PROMPT NEW THREADS ROUNDS

DIRECTORY holds genai_config.json. Prints a line of JSON: {"prompt": tokens/s, "decode": tokens/s, "decode_8": tokens/s of eight
texts together}, medians of the rounds.
"""

import statistics
import sys
import time

import numpy as np
import onnxruntime_genai as genai
from rates import print_medians


def run(model, batch, n_prompt, n_new):
    """Seconds to the first token, and for each that follows."""
    ids = (1 + (np.arange(batch)[:, None] * 7 + np.arange(n_prompt)) % 250).astype(np.int32)
    settings = genai.GeneratorParams(model)
    length = n_prompt + n_new
    settings.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=batch)
    generator, times = genai.Generator(model, settings), [time.perf_counter()]
    generator.append_tokens(ids if batch > 1 else ids[0])
    for _ in range(n_new):
        generator.generate_next_token()
        times.append(time.perf_counter())
    return times[1] - times[0], statistics.median(after - before for before, after in zip(times[1:], times[2:]))


def main():
    path, *numbers = sys.argv[1:]
    n_prompt, n_new, n_threads, n_rounds = map(int, numbers)
    config = genai.Config(path)
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {n_threads}}}}}}}}}')
    model = genai.Model(config)
    print_medians(lambda batch: run(model, batch, n_prompt, n_new), n_prompt, n_rounds)


main()
