"""A rank's flat ranges as rectangles of the whole tensor: each element once, and back again."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from megatron_solar.pieces import overlap, rectangles
from megatron_solar.weights import part_of_tensor, rank_part

KEYS = (
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.mlp.linear_fc2.weight",
    "decoder.layers.0.self_attention.linear_proj.weight",
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
)


def cut(length: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Split [0, length) at some places, as data-parallel ranks share a tensor."""
    ends = sorted({0, length, *(place % (length + 1) for place in cuts)})
    return list(itertools.pairwise(ends))


@given(
    key=some.sampled_from(KEYS),
    tensor_parallel=some.sampled_from([1, 2, 4]),
    rows=some.integers(1, 3),
    vocabulary=some.integers(1, 70),
    columns=some.integers(1, 3),
    cuts=some.lists(some.integers(0, 10_000), max_size=6),
)
def test_the_ranges_of_all_ranks_make_the_whole_tensor_with_each_element_once(
    key: str, tensor_parallel: int, rows: int, vocabulary: int, columns: int, cuts: list[int]
) -> None:
    size = (8 * rows,) if "layernorm" in key else (8 * rows, 4 * columns)
    if "embedding" in key:
        size = (vocabulary, 4 * columns)
    whole = torch.arange(1, 1 + math.prod(size)).reshape(size)
    made = torch.full(size, -1)
    times = torch.zeros(size, dtype=torch.int64)
    for rank in range(tensor_parallel):
        part = part_of_tensor(key, size, rank, tensor_parallel)
        local = rank_part(key, whole, rank, tensor_parallel)  # megatron's own split, checked by the parity tests
        assert tuple(local.shape) == part.shape
        assert local.shape[0] % 8 == 0 or "embedding" not in key
        for start, stop in cut(local.numel(), cuts):
            values = local.flatten()[start:stop]
            found = rectangles(part, start, stop)
            assert len(found) <= 3 * len(part.blocks)
            assert sum(rectangle.elements for rectangle in found) == int((values != 0).sum())  # padding lies nowhere
            for rectangle in found:
                place = tuple(slice(a, a + n) for a, n in zip(rectangle.offset, rectangle.size, strict=True))
                piece = values[rectangle.start : rectangle.start + rectangle.elements].view(rectangle.size)
                made[place] = piece
                times[place] += 1
    assert torch.equal(made, whole)
    expected = tensor_parallel if "layernorm" in key else 1
    assert torch.equal(times, torch.full(size, expected))


@given(
    first=some.tuples(some.integers(0, 5), some.integers(0, 5), some.integers(1, 5), some.integers(1, 5)),
    second=some.tuples(some.integers(0, 5), some.integers(0, 5), some.integers(1, 5), some.integers(1, 5)),
)
def test_what_two_rectangles_share_is_what_both_cover(
    first: tuple[int, int, int, int], second: tuple[int, int, int, int]
) -> None:
    grid = torch.arange(100).reshape(10, 10)
    a = grid[first[0] : first[0] + first[2], first[1] : first[1] + first[3]]
    b = grid[second[0] : second[0] + second[2], second[1] : second[1] + second[3]]
    both = sorted(set(a.flatten().tolist()) & set(b.flatten().tolist()))
    shared = overlap(first[:2], first[2:], second[:2], second[2:])
    if shared is None:
        assert both == []
        return
    assert a[shared.within_first].flatten().tolist() == both == b[shared.within_second].flatten().tolist()
    assert shared.elements == len(both)


def test_the_gate_and_up_blocks_of_a_rank_lie_apart_in_the_whole() -> None:
    part = part_of_tensor("decoder.layers.0.mlp.linear_fc1.weight", (8, 3), 1, 2)
    found = rectangles(part, 0, 12)
    assert [(rectangle.offset, rectangle.size) for rectangle in found] == [((2, 0), (2, 3)), ((6, 0), (2, 3))]


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 12, [((0, 0), (3, 4))]),
        (1, 12, [((0, 1), (1, 3)), ((1, 0), (2, 4))]),
        (0, 11, [((0, 0), (2, 4)), ((2, 0), (1, 3))]),
        (5, 7, [((1, 1), (1, 2))]),
        (3, 5, [((0, 3), (1, 1)), ((1, 0), (1, 1))]),
        (4, 8, [((1, 0), (1, 4))]),
        (5, 5, []),
    ],
)
def test_a_range_is_broken_rows_around_whole_ones(
    start: int, stop: int, expected: list[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    part = part_of_tensor("embedding.word_embeddings.weight", (3, 4), 0, 1)
    assert [(found.offset, found.size) for found in rectangles(part, start, stop)] == expected
