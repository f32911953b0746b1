"""How a model and its batch are spread over ranks.

Rank order is tp-cp-dp-pp, megatron-core's default: neighbours on the tensor-parallel axis are
neighbouring ranks, so tensor parallelism stays within a node.
"""

import dataclasses
import math

from orchestrator.model_shape import TransformerShape, choose, divisors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankCoordinates:
    """Where a rank stands on each axis of the grid."""

    tensor: int
    data: int
    pipeline: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the rank grid and of the batch.

    `virtual_pipeline_parallel` is the number of model chunks a pipeline rank holds; 1 is the plain
    schedule. Batches count sequences.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    global_batch_size: int
    data_parallel: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that one pipeline works through in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return a rank's place on the grid."""
        rest, tensor = divmod(rank, self.tensor_parallel)
        pipeline, data = divmod(rest, self.data_parallel)
        return RankCoordinates(tensor=tensor, data=data, pipeline=pipeline)

    def describe(self) -> str:
        """Return 'TP 2 × PP 1 × DP 4, sequence parallel'."""
        parts = [f"TP {self.tensor_parallel}", f"PP {self.pipeline_parallel}", f"DP {self.data_parallel}"]
        if self.virtual_pipeline_parallel > 1:
            parts[1] += f" (VPP {self.virtual_pipeline_parallel})"
        return " × ".join(parts) + (", sequence parallel" if self.sequence_parallel else "")

    def problems(self, shape: TransformerShape, sequence_length: int, ranks_per_node: int) -> list[str]:
        """Return every size that does not divide, each with those that would."""
        found = []
        for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline_parallel", "micro_batch_size",
                     "global_batch_size"):  # fmt: skip
            if getattr(self, name) < 1:
                found.append(f"layout.{name} should be at least 1, found {getattr(self, name)}")
        if found:
            return found
        tp, pp, vpp = self.tensor_parallel, self.pipeline_parallel, self.virtual_pipeline_parallel
        remedy = choose("tensor_parallel", self.tensor_parallel_sizes(shape, sequence_length, ranks_per_node), tp)
        for name, size, is_split in (
            ("num_query_groups", shape.num_query_groups, splits_groups(shape, tp)),
            ("num_attention_heads", shape.num_attention_heads, shape.num_attention_heads % tp == 0),
            ("ffn_hidden_size", shape.ffn_hidden_size, shape.ffn_hidden_size % tp == 0),
        ):
            if not is_split:
                found.append(f"model.{name}={size} cannot be split over layout.tensor_parallel={tp}; {remedy}")
        if ranks_per_node % tp:
            found.append(f"layout.tensor_parallel={tp} leaves the node, which has {ranks_per_node} ranks; {remedy}")
        if self.sequence_parallel and sequence_length % tp:
            found.append(
                f"data.sequence_length={sequence_length} cannot be split over layout.tensor_parallel={tp} "
                f"with sequence_parallel; {remedy}"
            )
        if vpp > 1 and pp == 1:
            found.append(
                f"layout.virtual_pipeline_parallel={vpp} needs pipeline_parallel above 1, found 1; "
                "use virtual_pipeline_parallel 1"
            )
        elif shape.num_layers % (pp * vpp):
            what = f"pipeline_parallel={pp}" + (f" x virtual_pipeline_parallel={vpp}" if vpp > 1 else "")
            if shape.num_layers % pp == 0:
                remedy = choose("virtual_pipeline_parallel", divisors(shape.num_layers // pp), vpp)
            else:
                fitting = self.pipeline_parallel_sizes(shape, vpp)
                remedy = choose("pipeline_parallel", fitting or self.pipeline_parallel_sizes(shape, 1), pp)
                remedy += "" if fitting else " with virtual_pipeline_parallel 1"
            found.append(f"model.num_layers={shape.num_layers} cannot be split over layout.{what}; {remedy}")
        # The interleaved schedule works through micro-batches in groups of `pp`.
        unit = self.micro_batch_size * self.data_parallel * (pp if vpp > 1 else 1)
        if self.global_batch_size % unit:
            lower = self.global_batch_size // unit * unit
            near = [size for size in (lower, lower + unit) if size > 0]
            found.append(
                f"layout.global_batch_size={self.global_batch_size} does not divide by micro_batch_size="
                f"{self.micro_batch_size} x data_parallel={self.data_parallel}"
                + (f" x pipeline_parallel={pp}, as virtual_pipeline_parallel={vpp} needs" if vpp > 1 else "")
                + f"; {choose('global_batch_size', near, self.global_batch_size)}"
            )
        return found

    def tensor_parallel_sizes(self, shape: TransformerShape, sequence_length: int, ranks_per_node: int) -> list[int]:
        """Return the sizes that split the model and the sequence, and stay within a node and the ranks."""
        every = [shape.num_attention_heads, shape.ffn_hidden_size, ranks_per_node]
        if self.sequence_parallel:
            every.append(sequence_length)
        sizes = divisors(math.gcd(*every, self.tensor_parallel * self.data_parallel))
        return [n for n in sizes if splits_groups(shape, n)]

    def pipeline_parallel_sizes(self, shape: TransformerShape, virtual: int) -> list[int]:
        """Return the sizes that split the layers into so many chunks a rank, and the ranks."""
        sizes = divisors(math.gcd(shape.num_layers, self.pipeline_parallel * self.data_parallel))
        return [n for n in sizes if virtual == 1 or (n > 1 and shape.num_layers % (n * virtual) == 0)]


def splits_groups(shape: TransformerShape, tensor_parallel: int) -> bool:
    """Whether each rank has KV groups of its own, or ranks share each group, as multi-query attention needs.

    Where they share, megatron-core splits all rows of query, key and value evenly and gathers what they compute.
    """
    groups, rows = shape.num_query_groups, shape.query_size + 2 * shape.key_size
    return groups % tensor_parallel == 0 or (tensor_parallel % groups == 0 and rows % tensor_parallel == 0)
