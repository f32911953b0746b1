"""Every way of sharing the work against one rank: losses, gradient norms and held-out losses; and what recompute saves.

fp32 on the CPU. The tolerance of losses, 1e-6 relative, is that of sums in another order, as in test_training.py.
Recompute does the same sums again and must give the same bits.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from megatron_solar.context_parallel import causal_mask, in_order_of_tokens, share_of_sequence
from megatron_solar.cpu import cuda_calls_on_cpu
from orchestrator.config import compose, recompose
from orchestrator.events import StepEvent
from orchestrator.files import write_json
from orchestrator.plan import TrainingPlan, make_plan, write_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from tests.conftest import SMALL, Trainer, events_of, losses, relative_difference, validation_losses

STEPS = 5
NORM_NOISE = 3e-4
"""torch's fp32 norm of a million numbers on the CPU, an embedding's, is off by 1e-4, and by less where ranks cut it."""
OVERLAP = (
    "layout.overlap_gradient_reduce=true",
    "layout.overlap_parameter_gather=true",
    "layout.bucket_parameters=20000",  # so that there are several
)
SOLAR = (
    "layout.tensor_parallel=2",
    "layout.pipeline_parallel=2",
    "layout.sequence_parallel=true",
    "cluster.ranks_per_node=8",
    *OVERLAP,
)
INTERLEAVED = (
    "layout.pipeline_parallel=2",
    "layout.virtual_pipeline_parallel=2",
    "cluster.ranks_per_node=4",
    *OVERLAP,
)
CONTEXT_AND_TENSOR = (
    "layout.context_parallel=2",
    "layout.tensor_parallel=2",
    "layout.sequence_parallel=true",
    "cluster.ranks_per_node=4",
)
CONTEXT_AND_PIPELINE = ("layout.context_parallel=2", "layout.pipeline_parallel=2", "cluster.ranks_per_node=4")
CONTEXT_AND_DATA = ("layout.context_parallel=2", "cluster.ranks_per_node=4", *OVERLAP)
BLOCK = ("layout.recompute=full", "layout.recompute_method=block", "layout.recompute_layers=3")
BACK_TO_ONE_RANK = (
    "layout.tensor_parallel=1",
    "layout.pipeline_parallel=1",
    "layout.virtual_pipeline_parallel=1",
    "layout.context_parallel=1",
    "layout.sequence_parallel=false",
    "layout.overlap_gradient_reduce=false",
    "layout.overlap_parameter_gather=false",
    "layout.bucket_parameters=0",
    "layout.recompute=none",
    "layout.recompute_method=uniform",
    "layout.recompute_layers=1",
    "cluster.ranks_per_node=1",
)

Curves = tuple[list[float], list[float], list[float]]


def curves(*attempts: AttemptDirectory) -> Curves:
    """Return losses, gradient norms and held-out losses."""
    steps = [event for attempt in attempts for event in events_of(attempt) if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == list(range(1, STEPS + 1))
    held_out = [loss for attempt in attempts for loss in validation_losses(attempt)]
    return losses(*attempts), [event.gradient_norm for event in steps], held_out


def make_run(trainer: Trainer, *overrides: str) -> tuple[RunDirectory, TrainingPlan]:
    return trainer.make_run(*overrides, "training.validation_interval_steps=3", steps=STEPS)


def one_step(trainer: Trainer, run: RunDirectory, plan: TrainingPlan) -> AttemptDirectory:
    """Start an attempt that is asked to stop before its first step, which it finishes and saves."""
    attempt, ranks = trainer.start(run, plan)
    write_json(attempt.stop_request, {"reason": "time_limit"})
    trainer.wait(run, attempt, ranks)
    return attempt


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer) -> Curves:
    return curves(trainer.train(*make_run(trainer)))


def compare(found: Curves, expected: Curves) -> None:
    loss, norm, held_out = (relative_difference(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    print(f"largest relative difference: loss {loss:.1e}, gradient norm {norm:.1e}, held-out {held_out:.1e}")
    assert max(loss, held_out) < 1e-6
    assert norm < NORM_NOISE


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(INTERLEAVED, id="PP2-VPP2-DP2-overlap"),
        pytest.param(SOLAR, id="TP2-PP2-DP2-SP-overlap"),
        pytest.param(CONTEXT_AND_TENSOR, id="TP2-CP2-SP"),
        pytest.param(CONTEXT_AND_PIPELINE, id="CP2-PP2"),
    ],
)
def test_steps_at_a_layout_are_those_of_one_rank(
    trainer: Trainer, one_rank: Curves, overrides: tuple[str, ...]
) -> None:
    compare(curves(trainer.train(*make_run(trainer, *overrides))), one_rank)


def test_a_resume_that_changes_what_is_recomputed_has_the_same_bits(trainer: Trainer, one_rank: Curves) -> None:
    whole = curves(trainer.train(*make_run(trainer, *CONTEXT_AND_DATA)))
    compare(whole, one_rank)
    run, plan = make_run(trainer, *CONTEXT_AND_DATA, "layout.recompute=selective")
    first = one_step(trainer, run, plan)
    plan = make_plan(recompose(plan.settings, BLOCK))
    write_plan(run.launched_plan, plan)
    assert curves(first, trainer.train(run, plan)) == whole


def test_a_run_changes_each_way_of_sharing_and_goes_on_as_one_rank_would(trainer: Trainer, one_rank: Curves) -> None:
    run, plan = make_run(trainer, *CONTEXT_AND_TENSOR)
    attempts = [one_step(trainer, run, plan)]
    for following in (INTERLEAVED, CONTEXT_AND_DATA, BLOCK):
        plan = make_plan(recompose(plan.settings, (*BACK_TO_ONE_RANK, *following)))
        write_plan(run.launched_plan, plan)
        attempts.append(one_step(trainer, run, plan) if following != BLOCK else trainer.train(run, plan))
    compare(curves(*attempts), one_rank)


class SavedActivations:
    """Bytes that autograd keeps for the backward pass, parameters aside; each storage counted once."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        self._owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._held: Counter[tuple[int, int]] = Counter()
        self.peak_bytes = 0

    def __enter__(self) -> "SavedActivations":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def _pack(self, tensor: torch.Tensor) -> "Packed":
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key[0] not in self._owned:
            self._held[key] += 1
            self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._held))
        return Packed(tensor, key, self._held)


class Packed:
    """A tensor that autograd has saved, until it lets go of it."""

    def __init__(self, tensor: torch.Tensor, key: tuple[int, int], held: "Counter[tuple[int, int]]") -> None:
        self.tensor, self._key, self._held = tensor, key, held

    def __del__(self) -> None:
        self._held[self._key] -= 1
        self._held += Counter()  # drops what is not held any more


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Be the only rank of a process group."""
    with cuda_calls_on_cpu():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def peak_bytes(*overrides: str) -> int:
    """Return the most that a forward and backward pass of 8 layers keeps."""
    from megatron_solar import compat

    plan = make_plan(
        compose("demo-base", [*SMALL, "data.train=unused", "data.validation=[]", "model.num_layers=8",
                              "model.vocab_size=64", "training.tokens=1000", *overrides])
    )  # fmt: skip
    settings = plan.settings
    length = settings.data.sequence_length
    config = compat.transformer_config(settings.model, plan.layout, settings.training, settings.precision, "cpu")
    chunk = compat.build_chunk(settings.model, config, length, "cpu", None).train()
    tokens_BS = torch.arange(length).unsqueeze(0)
    with SavedActivations(chunk.parameters()) as saved:
        chunk(tokens_BS, tokens_BS, None, labels=tokens_BS).mean().backward()
    return saved.peak_bytes


def test_recompute_keeps_less() -> None:
    with alone():
        from megatron_solar import compat

        compat.initialize_parallel(make_plan(compose("demo-base", [*SMALL, "data.train=unused"])).layout, 1)
        nothing = peak_bytes()
        selective = peak_bytes("layout.recompute=selective")
        block = peak_bytes("layout.recompute=full", "layout.recompute_method=block", "layout.recompute_layers=4")
        single = peak_bytes("layout.recompute=full")
        pairs = peak_bytes("layout.recompute=full", "layout.recompute_layers=2")
    print(f"kept: {nothing:,} bytes; selective {selective:,}, block 4 {block:,}, uniform 2 {pairs:,}, 1 {single:,}")
    assert single < pairs < block < nothing
    assert selective < nothing
    # Each of 8 layers keeps its input, 32 tokens of 32 fp32 numbers; one layer is computed again at a time.
    assert 8 * 32 * 32 * 4 < single < nothing / 3


@dataclasses.dataclass(frozen=True)
class Place:
    """What megatron asks of a process group here."""

    number: int
    ranks: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_shares_of_context_ranks_are_whole_sequences_and_megatrons(ranks: int) -> None:
    length = 24
    tokens_BS = torch.arange(2 * length).view(2, length)
    shares = [share_of_sequence(tokens_BS, 1, rank, ranks) for rank in range(ranks)]
    assert torch.equal(in_order_of_tokens(torch.cat([share.t() for share in shares]), ranks), tokens_BS.t())
    with alone():
        from megatron.core.utils import get_batch_on_this_cp_rank

        for rank, share in enumerate(shares):
            theirs = get_batch_on_this_cp_rank({"tokens": tokens_BS}, Place(rank, ranks))
            assert torch.equal(share, theirs["tokens"])
    for rank, share in enumerate(shares):
        hidden = causal_mask(length, rank, ranks, torch.device("cpu"))[0, 0]
        assert hidden.tolist() == [[key > int(query) for key in range(length)] for query in share[0]]
        assert int((~hidden).sum()) * ranks == length * (length + 1) // 2  # the same work for each
