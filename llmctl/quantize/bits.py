"""Codes of a few bits packed into int32 words without gaps, the lowest bits first, as the layouts of checkpoints have them."""

from __future__ import annotations

import torch

WORD = 32


def words_for(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def pack(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [N, ceil(K bits / 32)] of codes (uint8, below 2^bits)."""
    n_rows, n_codes = codes_NK.shape
    if bits in (4, 8):
        bytes_ = torch.nn.functional.pad(codes_NK, (0, -n_codes % (WORD // bits)))
        if bits == 4:
            bytes_ = bytes_[:, ::2] | (bytes_[:, 1::2] << 4)
        return bytes_.flatten().view(torch.int32).view(n_rows, -1)
    places = torch.arange(bits, dtype=torch.uint8)
    flat = ((codes_NK[..., None] >> places) & 1).flatten(1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % WORD)).view(n_rows, -1, 8)
    bytes_ = (flat << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return bytes_.flatten().view(torch.int32).view(n_rows, -1)


def unpack(words_NW: torch.Tensor, bits: int, n_codes: int) -> torch.Tensor:
    """The first `n_codes` codes of each row, uint8 [N, K]."""
    bytes_ = words_NW.flatten().view(torch.uint8).view(len(words_NW), -1)
    if bits == 8:
        return bytes_[:, :n_codes].contiguous()
    if bits == 4:
        return torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1)[:, :n_codes].contiguous()
    flat = ((bytes_[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)[:, : n_codes * bits]
    places = torch.arange(bits, dtype=torch.uint8)
    return (flat.view(len(words_NW), n_codes, bits) << places).sum(-1, dtype=torch.uint8)
