"""Columns that were quantized in the order of their activations: which group each belongs to (`g_idx`)."""

from __future__ import annotations

import dataclasses

import torch

from llmctl.errors import UserError
from llmctl.models.packed import AffineWeight


def by_groups(weight: AffineWeight, groups_K: torch.Tensor, name: str) -> AffineWeight:
    """The same matrix with each group's columns side by side and `columns_K` saying whose they are.

    `weight` has its columns in their own order, as the file does. Raises UserError where the groups are not of one size.
    """
    n_in, n_groups = weight.shape[1], weight.scales_NJ.shape[1]
    groups_K = groups_K.long()
    usual_K = torch.arange(n_in) // weight.group_size
    if (groups_K < 0).all() or torch.equal(groups_K, usual_K):  # -1: never filled in
        return weight
    columns_K = groups_K.argsort(stable=True)
    if not torch.equal(groups_K[columns_K], usual_K) or int(groups_K.max()) >= n_groups:
        raise UserError(f"{name} does not part {n_in} columns into {n_groups} groups of {weight.group_size}")
    return dataclasses.replace(weight, codes_NK=weight.codes_NK[:, columns_K].contiguous(), columns_K=columns_K)
