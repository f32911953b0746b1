"""How a model and its batch are spread over ranks.

Rank order is tp-cp-dp-pp, megatron-core's default: neighbours on the tensor-parallel axis are
neighbouring ranks, so tensor parallelism stays within a node.
"""

import dataclasses
import math
from typing import Literal

from orchestrator.model_shape import TransformerShape, choose, divisors, multiples_near


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankCoordinates:
    """Where a rank stands on each axis of the grid."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the rank grid and of the batch, and how ranks of the grid work together.

    `virtual_pipeline_parallel` is the number of model chunks a pipeline rank holds; 1 is the plain
    schedule. Batches count sequences. The other fields are those of `LayoutSettings`.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    sequence_parallel: bool = False
    context_parallel: int = 1
    micro_batch_size: int = 1
    global_batch_size: int
    data_parallel: int = 1
    overlap_gradient_reduce: bool = False
    overlap_parameter_gather: bool = False
    bucket_parameters: int = 0
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.context_parallel * self.data_parallel * self.pipeline_parallel

    @property
    def weight_replicas(self) -> int:
        """Ranks that hold the same weights; over them the optimizer's state is spread."""
        return self.data_parallel * self.context_parallel

    @property
    def sequence_multiple(self) -> int:
        """What a sequence's length must be a multiple of."""
        parts = 2 * self.context_parallel if self.context_parallel > 1 else 1
        return math.lcm(parts, self.tensor_parallel * self.context_parallel if self.sequence_parallel else 1)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that one pipeline works through in a step with `global_batch_size`."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def batch_unit(self) -> int:
        """Sequences of which every step's global batch needs a whole number of times."""
        # The interleaved schedule works through micro-batches in groups of `pipeline_parallel`.
        rounds = self.pipeline_parallel if self.virtual_pipeline_parallel > 1 else 1
        return self.micro_batch_size * self.data_parallel * rounds

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return a rank's place on the grid."""
        rest, tensor = divmod(rank, self.tensor_parallel)
        rest, context = divmod(rest, self.context_parallel)
        pipeline, data = divmod(rest, self.data_parallel)
        return RankCoordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)

    def describe(self) -> str:
        """Return 'TP 2 × CP 2 × PP 1 × DP 4, sequence parallel, full recompute (uniform 1)', without what is off."""
        pipeline = f"PP {self.pipeline_parallel}"
        if self.virtual_pipeline_parallel > 1:
            pipeline += f" (VPP {self.virtual_pipeline_parallel})"
        context = [f"CP {self.context_parallel}"] if self.context_parallel > 1 else []
        grid = " × ".join([f"TP {self.tensor_parallel}", *context, pipeline, f"DP {self.data_parallel}"])
        overlapped = ["gradient reduction"] if self.overlap_gradient_reduce else []
        overlapped += ["parameter gathering"] if self.overlap_parameter_gather else []
        said = [grid, "sequence parallel"] if self.sequence_parallel else [grid]
        said += [f"overlapped {' and '.join(overlapped)}"] if overlapped else []
        if self.recompute == "full":
            said.append(f"full recompute ({self.recompute_method} {self.recompute_layers})")
        elif self.recompute == "selective":
            said.append("selective recompute")
        return ", ".join(said)

    def problems(self, shape: TransformerShape, sequence_length: int, ranks_per_node: int) -> list[str]:
        """Return every size that does not divide, each with those that would."""
        found = []
        for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline_parallel", "context_parallel",
                     "micro_batch_size", "global_batch_size"):  # fmt: skip
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
        found += self._sequence_problems(sequence_length, remedy)
        found += self._overlap_problems() + self._recompute_problems(shape)
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
        unit = self.batch_unit
        if self.global_batch_size % unit:
            near = multiples_near(unit, self.global_batch_size)
            found.append(
                f"layout.global_batch_size={self.global_batch_size} does not divide by micro_batch_size="
                f"{self.micro_batch_size} x data_parallel={self.data_parallel}"
                + (f" x pipeline_parallel={pp}, as virtual_pipeline_parallel={vpp} needs" if vpp > 1 else "")
                + f"; {choose('global_batch_size', near, self.global_batch_size)}"
            )
        return found

    def _sequence_problems(self, sequence_length: int, remedy: str) -> list[str]:
        """Return whether a sequence cannot be cut into equal parts.

        Args:
            remedy: the tensor-parallel sizes that would do.
        """
        tp, cp = self.tensor_parallel, self.context_parallel
        what = f"data.sequence_length={sequence_length} cannot be split over layout."
        if cp > 1 and sequence_length % (2 * cp):
            fitting = [1, *(size for size in range(2, 2 * cp) if sequence_length % (2 * size) == 0)]
            return [
                f"{what}context_parallel={cp}, which takes {2 * cp} equal parts; "
                f"{choose('context_parallel', fitting, cp)}"
            ]
        if self.sequence_parallel and sequence_length % (tp * cp):
            also = f" x context_parallel={cp}" if cp > 1 else ""
            return [f"{what}tensor_parallel={tp}{also} with sequence_parallel; {remedy}"]
        return []

    def _overlap_problems(self) -> list[str]:
        """Return what the overlap of communication with computing excludes."""
        found = []
        if self.overlap_parameter_gather and not self.overlap_gradient_reduce:
            found.append(
                "layout.overlap_parameter_gather=true needs overlap_gradient_reduce=true, found false; set that too, "
                "or overlap_parameter_gather=false"
            )
        if self.bucket_parameters < 0:
            found.append(f"layout.bucket_parameters should be 0 or more, found {self.bucket_parameters}")
        if self.bucket_parameters > 0 and not self.overlap_gradient_reduce:
            found.append(
                f"layout.bucket_parameters={self.bucket_parameters} splits gradients whose reduction overlaps; set "
                "overlap_gradient_reduce=true, or bucket_parameters=0"
            )
        return found

    def _recompute_problems(self, shape: TransformerShape) -> list[str]:
        """Return whether layers are to be recomputed that no rank has."""
        if self.recompute != "full":
            unused = self.recompute_layers != 1 or self.recompute_method != "uniform"
            return [
                f"layout.recompute_method={self.recompute_method} with recompute_layers={self.recompute_layers} is of "
                f"recompute=full, found {self.recompute}; set that, or leave both away"
            ] if unused else []  # fmt: skip
        held = max(1, shape.num_layers // (self.pipeline_parallel * self.virtual_pipeline_parallel))
        fitting = divisors(held) if self.recompute_method == "uniform" else range(1, held + 1)
        if self.recompute_layers in fitting:
            return []
        what = "cannot be cut into groups of" if self.recompute_method == "uniform" else "are fewer than"
        return [
            f"layout.recompute_method={self.recompute_method}: the {held} layers of a model chunk {what} "
            f"recompute_layers={self.recompute_layers}; {choose('recompute_layers', fitting, self.recompute_layers)}"
        ]

    def tensor_parallel_sizes(self, shape: TransformerShape, sequence_length: int, ranks_per_node: int) -> list[int]:
        """Return the sizes that split the model and the sequence, and stay within a node and the ranks."""
        every = [shape.num_attention_heads, shape.ffn_hidden_size, ranks_per_node]
        if self.sequence_parallel:
            every.append(sequence_length // self.context_parallel)
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
