"""What quantization costs a model: perplexity, KL divergence and top-1 agreement on held-out text, by method and bits.

    python tests/bench/quantize_quality.py MODEL --calibration train.txt --held-out val.txt [--ggml libggml-base.so]

MODEL is an ordinary checkpoint, best one trained on text like that of both files. With ggml's library (llama-cpp-python
brings it) llama.cpp's own rounding of the same matrices stands in the table: Q4_K_M gives, as its `llama-quantize` does,
Q6_K to attn_v and ffn_down of every layer that "uses more bits", Q4_K to the others. Embedding and head stay as they
are for everybody, so that matrices alone are compared. Bits are those stored for a quantized weight, scales included.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import tempfile
import time
from pathlib import Path

ROWS = [
    ("int4 g64 gptq", {"method": "gptq"}),
    ("int4 g64 rtn", {}),
    ("int4 g64 awq", {"method": "awq"}),
    ("nf4", {"format": "nf4"}),
    ("fp4", {"format": "fp4"}),
    ("fp8", {"format": "fp8"}),
    ("int8 rtn", {"format": "int8"}),
    ("int4 g64 asym gptq", {"symmetric": False, "method": "gptq"}),
    ("int4 g32 gptq", {"group_size": 32, "method": "gptq"}),
    ("int4 g64 gptq, 4.8 bits", {"method": "gptq", "target_bits": 4.8}),
    ("int4 g64 asym awq", {"symmetric": False, "method": "awq"}),
]
Q4_K, Q6_K, Q4_0, Q8_0 = 12, 14, 2, 8  # of enum ggml_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--ggml", help="libggml-base.so of llama.cpp")
    parser.add_argument("--samples", type=int, default=64, help="sequences to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens in each, and in the held-out ones")
    parser.add_argument("--rows", type=int, default=64, help="held-out sequences")
    parser.add_argument("--only", default="", help="regular expression of the rows to run")
    args = parser.parse_args()

    import torch

    from llmctl.models.loading import stored_config
    from llmctl.models.streaming import StreamedModel
    from llmctl.quantize import comparison
    from llmctl.tokenizer import Tokenizer

    ids = torch.tensor(Tokenizer.load(args.model).encode(Path(args.held_out).read_text()))
    length = min(args.length, stored_config(args.model).max_positions or args.length)
    ids_BT = ids[: len(ids) // length * length].view(-1, length)[: args.rows]
    before = StreamedModel(args.model)
    hidden_BTD = before.hidden(ids_BT)
    before.hidden = lambda _: hidden_BTD

    def show(name, bits, after, seconds):
        [found] = comparison.compare(before, ids_BT, after)
        cells = f"{found.perplexity_after:12.4f}{found.kl_divergence:11.5f}{found.top1_agreement:9.2%}{seconds:7.1f}"
        print(f"{name:<26}{bits:6.2f}{cells}", flush=True)

    print(
        f"{ids_BT.numel()} held-out tokens\n{'':<26}{'bits':>6}{'perplexity':>12}{'KL, nats':>11}{'top-1':>9}{'s':>7}"
    )
    for name, kinds in (("Q4_K_M", None), ("Q4_0", Q4_0), ("Q8_0", Q8_0)) if args.ggml else ():
        if re.search(args.only, name):
            show(f"llama.cpp {name}", *_theirs(args, kinds))
    for name, changes in ROWS:
        if re.search(args.only, name):
            show(name, *_ours(args, changes))


def _ours(args, changes: dict):
    from llmctl.models.streaming import StreamedModel
    from llmctl.quantize.run import quantize
    from llmctl.quantize.settings import QuantizeSettings

    start = time.perf_counter()
    output = Path(tempfile.mkdtemp(prefix="llmctl-bench-")) / "out"
    settings = QuantizeSettings(
        tolerance=1e9,
        calibration=args.calibration,
        calibration_samples=args.samples,
        calibration_length=args.length,
        **changes,
    )
    found = quantize(args.model, output, settings)
    return found.bits_per_weight, StreamedModel(output), time.perf_counter() - start


def _theirs(args, kind: int | None):
    """The matrices through ggml's own rounding, in blocks along a row; kind None is the mixture of Q4_K_M."""
    import gguf
    import numpy as np
    import torch

    from llmctl.models.loading import new_empty, stored_config
    from llmctl.models.streaming import StreamedModel
    from llmctl.quantize import matrices
    from llmctl.quantize.stored import open_weights

    library = ctypes.CDLL(args.ggml)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    config, start, sizes = stored_config(args.model), time.perf_counter(), {}
    with torch.device("meta"):
        found = {f"{m.theirs}.weight": m for m in matrices.find(new_empty(config), open_weights(args.model).keys())}
    found = {name: matrix for name, matrix in found.items() if "layers." in matrix.ours[0]}

    def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in found:
            return tensor
        matrix = found[name]
        form = gguf.GGMLQuantizationType(_kind(matrix.ours[0], config.n_layers) if kind is None else kind)
        weight = np.ascontiguousarray(matrix.upright(tensor).numpy())
        block, block_bytes = gguf.GGML_QUANT_SIZES[form]
        if weight.shape[1] % block:
            raise SystemExit(f"{name}: rows of {weight.shape[1]} do not divide into {form.name}'s blocks of {block}")
        out = np.empty(weight.size // block * block_bytes, dtype=np.uint8)
        library.ggml_quantize_chunk(int(form), weight.ctypes.data, out.ctypes.data, 0, *weight.shape, None)
        sizes[name] = (out.nbytes * 8, weight.size)
        values = torch.from_numpy(gguf.quants.dequantize(out.reshape(len(weight), -1), form)).view(matrix.shape)
        return values.mT if matrix.transposed else values

    streamed = StreamedModel(args.model, replaced=rounded)
    streamed.logits(torch.zeros(1, 8, dtype=torch.long))
    bits = sum(total for total, _ in sizes.values()) / sum(count for _, count in sizes.values())
    return bits, streamed, time.perf_counter() - start


def _kind(path: str, n_layers: int) -> int:
    """llama.cpp's choice for Q4_K_M: the first and the last eighth of the layers, and each third between."""
    number = int(re.search(r"layers\.(\d+)", path).group(1))
    eighth = n_layers // 8
    more = number < eighth or number >= 7 * n_layers // 8 or (number - eighth) % 3 == 2
    return Q6_K if more and re.search(r"v_proj$|down_proj$", path) else Q4_K


if __name__ == "__main__":
    main()
