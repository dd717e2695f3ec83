"""Causal attention for training on a CPU: blocks of queries through the processor's matrix units, the softmax in csrc.

torch's flash kernel for the CPU reaches a tenth of what its matrix products do. Where the processor has tile registers a kernel
of csrc does all of it (`training_attention`). Elsewhere a block of queries meets all its keys in one batched product; scores
exist for one block at a time, in the dtype of the inputs, and are recomputed in the backward
pass from the softmax's denominators (as in FlashAttention-2, arXiv:2307.08691, algorithm 2). Packed documents cost nothing:
each query says where its keys begin.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmctl.ops import native, training_attention
from llmctl.ops.dispatch import DTYPES, cpu_library

QUERIES_PER_BLOCK = 256
SCORES_PER_BLOCK = 1 << 22
"""Heads are taken together as long as their scores stay in the last-level cache."""


def applies(q_BHTK: torch.Tensor, is_packed: bool) -> bool:
    """Where it is the better choice: packed documents, and bfloat16. For float32, and on tile registers for heads that do not
    fill them, torch's own kernel is as fast."""
    library = cpu_library() if q_BHTK.device.type == "cpu" and q_BHTK.dtype in DTYPES else None
    if library is None or is_packed:
        return library is not None
    is_ours = training_attention.applies(q_BHTK) or library.llmctl_isa() != b"amx"
    return q_BHTK.dtype == torch.bfloat16 and is_ours


def causal_attention(
    q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor, first_keys_BT: torch.Tensor | None
) -> torch.Tensor:
    """[B, H, T, K]; `first_keys_BT` int64 is the index of the first key that each query may attend to, None for 0."""
    q_BHTK, k_BGTK, v_BGTK = (x.contiguous() for x in (q_BHTK, k_BGTK, v_BGTK))
    return _forward(q_BHTK, k_BGTK, v_BGTK, first_keys_BT)[0]


@torch.library.custom_op("llmctl::blocked_attention", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_keys: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output like q, log of each softmax's denominator float32 [B, H, T])."""
    if training_attention.applies(q):
        return training_attention.forward(q, k, v, first_keys)
    out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for block in _blocks(q, k, first_keys):
        scores = block.queries(q) @ block.keys(k).mT
        sums = scores.new_empty(scores.shape[:2], dtype=torch.float32)
        numbers = [q.shape[-1] ** -0.5, sums.data_ptr()]
        _call("llmctl_attention_softmax", block, [scores], numbers)
        block.queries_view(out).copy_((scores @ block.keys(v)).unflatten(1, block.group_shape))
        block.queries_view(log_sums.unsqueeze(-1)).copy_(sums.unflatten(1, block.group_shape).unsqueeze(-1))
    return out, log_sums


@_forward.register_fake
def _(q, k, v, first_keys):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llmctl::blocked_attention_backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    first_keys: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if training_attention.applies(q):
        return training_attention.backward(grad_out, q, k, v, out, log_sums, first_keys)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    deltas = (grad_out.float() * out.float()).sum(-1, keepdim=True)
    for block in _blocks(q, k, first_keys):
        queries, outward = block.queries(q), block.queries(grad_out)
        scores, grads = queries @ block.keys(k).mT, outward @ block.keys(v).mT
        sums, delta = block.queries(log_sums.unsqueeze(-1)), block.queries(deltas)
        numbers = [q.shape[-1] ** -0.5, sums.data_ptr(), delta.data_ptr()]
        _call("llmctl_attention_softmax_backward", block, [scores, grads], numbers)
        block.keys(grad_v).add_(scores.mT @ outward)
        block.keys(grad_k).add_(grads.mT @ queries)
        block.queries_view(grad_q).copy_((grads @ block.keys(k)).unflatten(1, block.group_shape))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_backward.register_fake
def _(grad_out, q, k, v, out, log_sums, first_keys):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, first_keys = inputs
    ctx.save_for_backward(q, k, v, *output, first_keys)


def _differentiate(ctx, grad_out, _):
    q, k, v, out, log_sums, first_keys = ctx.saved_tensors
    return *_backward(grad_out.contiguous(), q, k, v, out, log_sums, first_keys), None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Block:
    """Some rows of [batch x kv heads], a stretch of queries, and the keys that any of those may attend to.

    The query heads of one kv head stand below each other, so that they meet its keys in one product and are not repeated.
    """

    def __init__(self, rows: slice, queries: tuple[int, int], keys: tuple[int, int], group: int, begin: torch.Tensor):
        self.rows, self._queries, self._keys, self.group = rows, queries, keys, group
        self.begin = (begin - keys[0]).to(torch.int32).contiguous()
        self.end = torch.arange(queries[0], queries[1], dtype=torch.int32) + (1 - keys[0])

    @property
    def group_shape(self) -> tuple[int, int]:
        return self.group, self._queries[1] - self._queries[0]

    def queries_view(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        """[rows, group, queries, K], a view."""
        grouped = x_BHTK.view(-1, self.group, *x_BHTK.shape[2:])
        return grouped[self.rows, :, slice(*self._queries)]

    def queries(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        """[rows, group x queries, K]."""
        return self.queries_view(x_BHTK).flatten(1, 2).contiguous()

    def keys(self, x_BGTK: torch.Tensor) -> torch.Tensor:
        """[rows, keys, K], a view."""
        return x_BGTK.view(-1, *x_BGTK.shape[2:])[self.rows, slice(*self._keys)]


def _blocks(q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, first_keys_BT: torch.Tensor | None) -> Iterator[_Block]:
    batch, n_kv_heads, length = k_BGTK.shape[:3]
    group = q_BHTK.shape[1] // n_kv_heads
    # rows of the batch have documents of their own; without documents all rows are alike
    stretches = [(0, batch)] if first_keys_BT is None else [(row, row + 1) for row in range(batch)]
    for first_row, last_row in stretches:
        for start in range(0, length, QUERIES_PER_BLOCK):
            stop = min(start + QUERIES_PER_BLOCK, length)
            begin = torch.zeros(stop - start) if first_keys_BT is None else first_keys_BT[first_row, start:stop]
            first_key = int(begin.min())
            scores_per_row = group * (stop - start) * (stop - first_key)
            step = max(1, SCORES_PER_BLOCK // scores_per_row)
            for at in range(first_row * n_kv_heads, last_row * n_kv_heads, step):
                rows = slice(at, min(at + step, last_row * n_kv_heads))
                yield _Block(rows, (start, stop), (first_key, stop), group, begin)


def _call(name: str, block: _Block, matrices: list[torch.Tensor], numbers: list) -> None:
    """Run a row kernel in place over matrices [rows, group x queries, keys]; `numbers` are its arguments after the spans."""
    rows, queries, keys = matrices[0].shape
    spans = [block.begin.data_ptr(), block.end.data_ptr(), len(block.begin)]
    pointers = [matrix.data_ptr() for matrix in matrices]
    dtype = DTYPES[matrices[0].dtype]
    native.call(cpu_library(), name, dtype, *pointers, rows * queries, keys, *spans, *numbers)
