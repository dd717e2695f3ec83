"""What the programs that time an engine share."""

import json
import statistics


def print_medians(run, n_prompt, n_rounds):
    """A line of JSON with tokens/s, medians of the rounds. run(batch) gives the seconds to the first token and for each that
    follows."""
    rates = {"prompt": [], "decode": [], "decode_8": []}
    for number in range(n_rounds + 1):
        first, each = run(1)
        together = run(8)[1]
        if number:  # the first round warms up
            for name, rate in zip(rates, (n_prompt / first, 1 / each, 8 / together)):
                rates[name].append(rate)
    print(json.dumps({name: statistics.median(values) for name, values in rates.items()}))
