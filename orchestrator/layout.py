"""How a model and its batch are spread over ranks.

Rank order is tp-cp-dp-pp, megatron-core's default: neighbours on the tensor-parallel axis are
neighbouring ranks, so tensor parallelism stays within a node.
"""

import dataclasses

from orchestrator.model_shape import TransformerShape, could_be


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
        for name, size in (
            ("num_query_groups", shape.num_query_groups),
            ("num_attention_heads", shape.num_attention_heads),
            ("ffn_hidden_size", shape.ffn_hidden_size),
        ):
            if size % tp:
                found.append(f"model.{name}={size} cannot be split over layout.tensor_parallel={tp}; {could_be(size, tp)}")
        if tp > ranks_per_node:
            found.append(f"layout.tensor_parallel={tp} leaves the node, which has {ranks_per_node} ranks; "
                         f"{could_be(ranks_per_node, tp)}")  # fmt: skip
        if self.sequence_parallel and tp > 1 and sequence_length % tp:
            found.append(f"data.sequence_length={sequence_length} cannot be split over layout.tensor_parallel={tp} "
                         f"with sequence_parallel; {could_be(sequence_length, tp)}")  # fmt: skip
        if shape.num_layers % (pp * vpp):
            remedy = could_be(shape.num_layers // pp, vpp) if shape.num_layers % pp == 0 else could_be(shape.num_layers, pp)
            what = f"pipeline_parallel={pp}" + (f" x virtual_pipeline_parallel={vpp}" if vpp > 1 else "")
            found.append(f"model.num_layers={shape.num_layers} cannot be split over layout.{what}; {remedy}")
        if vpp > 1 and pp == 1:
            found.append(f"layout.virtual_pipeline_parallel={vpp} needs pipeline_parallel above 1, found 1; use 1")
        per_pass = self.micro_batch_size * self.data_parallel
        if self.global_batch_size % per_pass:
            lower = self.global_batch_size // per_pass * per_pass
            choices = [str(n) for n in (lower, lower + per_pass) if n > 0]
            found.append(f"layout.global_batch_size={self.global_batch_size} does not divide by micro_batch_size="
                         f"{self.micro_batch_size} x data_parallel={self.data_parallel}; use {' or '.join(choices)}")  # fmt: skip
        elif vpp > 1 and self.num_microbatches % pp:
            found.append(f"{self.num_microbatches} micro-batches do not divide by layout.pipeline_parallel={pp}, which "
                         f"virtual_pipeline_parallel needs; use a global_batch_size that is a multiple of {per_pass * pp}")  # fmt: skip
        return found
