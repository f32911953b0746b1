"""Which part of a sequence a context-parallel rank computes, and what its tokens may attend to. Pure.

With N ranks a sequence is cut into 2N parts, and rank r has the parts r and 2N - 1 - r: a late token looks back at more
than an early one, so that an early and a late part are the same work for every rank (Llama 3, arXiv 2407.21783,
section 3.3.2; megatron-core slices so too). Keys and values are gathered from all ranks, as in that paper, and come in
the order of the ranks.
"""

import torch
from torch import Tensor


def parts_of(rank: int, ranks: int) -> tuple[int, int]:
    """Return the two of 2 * ranks parts that a rank has, the earlier first."""
    return rank, 2 * ranks - 1 - rank


def share_of_sequence(whole: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """Return a rank's tokens of whole sequences, its early part before its late one."""
    parts = whole.chunk(2 * ranks, dim)
    early, late = parts_of(rank, ranks)
    return torch.cat([parts[early], parts[late]], dim)


def in_order_of_tokens(gathered: Tensor, ranks: int) -> Tensor:
    """Return the first dimension, which has the shares of all ranks one after another, in the order of the tokens."""
    parts = gathered.chunk(2 * ranks)
    found = [part for rank in range(ranks) for part in parts_of(rank, ranks)]
    return torch.cat([parts[found.index(part)] for part in range(2 * ranks)])


def causal_mask(length: int, rank: int, ranks: int, device: torch.device) -> Tensor:
    """Return [1, 1, length / ranks, length]: True where a token of the sequence comes after one of the rank's."""
    positions = torch.arange(length, device=device)
    own = share_of_sequence(positions, 0, rank, ranks)
    return (positions > own.unsqueeze(1)).view(1, 1, len(own), length)
