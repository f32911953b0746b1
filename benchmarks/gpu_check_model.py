"""A few layers of SOLAR's width in training on one GPU, with the code of a run: replica, samples, step, checkpoint.

Samples are drawn from a seed: Zipf's law, and every second token follows from the one before it, so that a loss falls
within a few steps.
"""

import dataclasses
import gc
import math
import statistics
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed
from torch import Tensor

from benchmarks.gpu_check_sizes import SEED, TINY, Size, precision_of, settings_of
from megatron_solar import compat
from megatron_solar.data import Samples
from megatron_solar.evidence import Evidence
from megatron_solar.model_folder import expected_tensors
from megatron_solar.one_step import StepResult, compute_step
from megatron_solar.replica import build_replica
from orchestrator.errors import PrecisionError
from orchestrator.model_shape import TransformerShape
from orchestrator.plan import TrainingPlan, make_plan
from orchestrator.run_directory import create_run
from orchestrator.schedule import learning_rate
from orchestrator.settings import PrecisionSettings, RunSettings
from orchestrator.units import format_bytes

SETTLED = 5
"""First steps whose time is not counted: kernels are compiled and chosen."""
STATIC_LIMIT = 0.10
"""What weights, gradients and optimizer may take beyond the plan, as a share; FP8 copies of weights come on top."""
FP8_COPY_BYTES = 2
"""Of each parameter of a linear part in FP8: the cast weight and, for the backward pass on Hopper, its transpose."""


class DrawnSamples:
    """Samples by number, always the same ones."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self._length = sequence_length
        self._vocab_size = vocab_size
        self._shares = numpy.cumsum(1.0 / (numpy.arange(vocab_size) + 3.0))
        self._shares /= self._shares[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return tokens, labels and position ids of one sample, int64."""
        generator = numpy.random.default_rng((SEED, number))
        drawn = numpy.searchsorted(self._shares, generator.random(self._length + 1))
        drawn[1::2] = (5 * drawn[0:-1:2] + 7) % self._vocab_size
        return {
            "tokens": drawn[:-1].astype(numpy.int64),
            "labels": drawn[1:].astype(numpy.int64),
            "position_ids": numpy.arange(self._length, dtype=numpy.int64),
        }


class DrawnWeights:
    """New weights as a run draws them, but on the device: 4 layers of SOLAR take a second there, and 15 on the CPU."""

    def __init__(self, shape: TransformerShape, device: str) -> None:
        self.shape = shape
        self._device = device
        self._sizes = expected_tensors(shape)

    def tensor(self, name: str) -> Tensor:
        """Return a new tensor, always the same for a name."""
        size = self._sizes[name]
        if len(size) == 1:
            return torch.ones(size, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{SEED}:{name}".encode()))
        is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / (math.sqrt(2 * self.shape.num_layers) if is_last else 1.0)
        return torch.empty(size, device=self._device).normal_(0.0, deviation, generator=generator)


def join_alone(device: str) -> None:
    """Initialize torch.distributed for one rank: NCCL on a GPU, gloo on the CPU; once a process."""
    if torch.distributed.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    compat.initialize_parallel(make_plan(settings_of(TINY, PrecisionSettings(), device)).layout, SEED)


class Trial:
    """A model in training, step by step."""

    def __init__(self, settings: RunSettings, folder: Path, *, is_filled_later: bool = False) -> None:
        """Build it.

        Args:
            folder: a new one, for the attempt's files.
            is_filled_later: whether the weights are left as megatron draws them.
        """
        self.device = settings.cluster.device
        join_alone(self.device)
        self.plan: TrainingPlan = make_plan(settings)
        self.run = create_run(folder, settings.name)
        self._attempt = self.run.new_attempt()
        source = None if is_filled_later else DrawnWeights(settings.model, self.device)
        self.replica = build_replica(self.plan, source, is_filled_later=is_filled_later)
        drawn: Any = DrawnSamples(settings.model.vocab_size, settings.data.sequence_length)
        request: Any = None
        self.samples = Samples(request=request, train=drawn, validation={})
        self._evidence = Evidence(self.replica.chunks)
        self.done = 0
        if settings.precision.fp8 == "delayed" and not is_filled_later:
            self._compute()  # for its histories, as a run does

    def _compute(self) -> StepResult:
        return compute_step(self.plan, self._attempt, self.replica, self.samples, self._evidence, self.done)

    def step(self) -> tuple[float, float]:
        """Do a step; return its loss and its seconds.

        Raises:
            ArithmeticError: loss or gradient norm is not finite.
        """
        training = self.plan.settings.training
        self.wait()
        began = time.perf_counter()
        result = self._compute()
        if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            raise ArithmeticError(
                f"step {self.done + 1}: loss {result.loss} and gradient norm {result.gradient_norm} should be finite"
            )
        rate = learning_rate(training, self.done + 1, self.plan.total_steps)
        compat.set_learning_rate(self.replica.optimizer, rate, training.weight_decay)
        compat.apply_gradients(self.replica.optimizer, result.gradient_norm)
        self.wait()
        self.done += 1
        return result.loss, time.perf_counter() - began

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def speed(self, seconds: float) -> dict[str, float]:
        """Return tokens a second, TFLOP/s and MFU of a step that takes so long."""
        tokens = self.plan.tokens_per_step / seconds
        tflops = tokens * self.plan.flops_per_token / 1e12
        return {
            "step_seconds": seconds,
            "tokens_per_second": tokens,
            "tflops": tflops,
            "mfu": tflops / self.replica.peak_tflops,
            "peak_tflops": self.replica.peak_tflops,
        }


def memory(trial: Trial) -> tuple[list[str], str, dict[str, Any]]:
    """Return what is wrong, a line and figures of a GPU's memory beside the plan's.

    What is allocated between two steps is what the plan calls static: no activation lives then.
    """
    trial.wait()
    gc.collect()
    shape, precision = trial.plan.settings.model, trial.plan.settings.precision
    planned, held = trial.plan.static_bytes_per_rank, torch.cuda.memory_allocated()
    in_fp8 = shape.num_layers - precision.first_bf16_layers - precision.last_bf16_layers
    copies = in_fp8 * shape.layer_parameters() * FP8_COPY_BYTES if precision.fp8 != "none" else 0
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    wrong = []
    if held > (planned + copies) * (1 + STATIC_LIMIT):
        wrong.append(f"between steps {format_bytes(planned + copies)} should be held, found {format_bytes(held)}")
    return (
        wrong,
        f"holds {format_bytes(held)} between steps, plan {format_bytes(planned)}"
        + (f" and {format_bytes(copies)} of FP8 copies" if copies else "")
        + f"; peak {format_bytes(peak)} allocated, {format_bytes(reserved)} reserved",
        {
            "static_bytes_planned": planned,
            "fp8_copy_bytes_expected": copies,
            "static_bytes_held": held,
            "peak_allocated_bytes": peak,
            "peak_reserved_bytes": reserved,
        },
    )


Found = tuple[str, str, list[str], str, dict[str, Any]]
"""Check, case, what is wrong, a line for people, figures."""


def train_a_little(size: Size, precision: PrecisionSettings, device: str, folder: Path) -> Iterator[Found]:
    """Train some steps; with FP8 prove after the first that it ran, and measure the gap to bf16 after the last."""
    from megatron_solar.ffn_inputs import FfnInputs

    precision = dataclasses.replace(precision, ffn_input_steps=size.steps)
    start_peak(device)
    trial = Trial(settings_of(size, precision, device), folder)
    inputs: list[Any] = []
    tell: Any = inputs.append
    largest = FfnInputs(trial.plan, trial.replica, tell)
    losses, seconds = [], []
    for number in range(1, size.steps + 1):
        with largest.measuring(number):
            loss, took = trial.step()
        losses.append(loss)
        seconds.append(took)
        if number == 1 and precision.fp8 != "none":
            yield proved(trial)
    fell = losses[-1] < losses[0]
    wrong = [] if fell else [f"the loss should fall, found {losses[0]:.4f} first and {losses[-1]:.4f} last"]
    speed = trial.speed(statistics.median(seconds[min(SETTLED, size.steps - 2) :]))
    told = (
        f"loss {losses[0]:.4f} to {losses[-1]:.4f}; {speed['tokens_per_second']:.0f} tokens/s, {speed['tflops']:.3g} "
        f"TFLOP/s, MFU {speed['mfu']:.1%}"
    )
    more = {"losses": losses, "seconds": seconds, "largest_ffn_inputs": [list(event.values) for event in inputs]}
    yield "model", precision.label, wrong, told, more | speed
    if device == "cuda":
        yield ("memory", precision.label, *memory(trial))
    if precision.fp8 != "none":
        yield gap(trial)


def start_peak(device: str) -> None:
    """Measure a GPU's peak memory from here."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def proved(trial: Trial) -> Found:
    """Run the proof of a run after its first step in FP8."""
    from megatron_solar.fp8_proof import prove_fp8

    label = trial.plan.settings.precision.label
    told: list[Any] = []
    try:
        prove_fp8(trial.plan, trial.replica, ["here"], told.append, trial.done)
    except PrecisionError as error:
        return "proof", label, [str(error)], "", {}
    return "proof", label, [], told[0].message, dataclasses.asdict(told[0])


def gap(trial: Trial) -> Found:
    """Measure how far the loss of a batch in FP8 lies from that in bf16."""
    from megatron_solar.fp8_gap import Fp8Gap

    label = trial.plan.settings.precision.label
    told: list[Any] = []
    Fp8Gap(trial.plan, trial.replica, trial.samples, told.append).measure(trial.done)
    event = told[0]
    wrong = ["the gap is above the alarm"] if event.is_alarm else []
    if event.bf16_loss == event.fp8_loss:
        wrong.append("both losses are the same to the bit, so that one of them was not computed as it says")
    return "gap", label, wrong, event.message, dataclasses.asdict(event)


def broken_proofs(size: Size, device: str, folder: Path) -> Iterator[Found]:
    """Break FP8 on purpose: each time the proof has to refuse, and to say why."""
    from megatron_solar.fp8_state import without_fp8

    size = dataclasses.replace(size, shape=dataclasses.replace(size.shape, num_layers=2))
    asked = dataclasses.replace(precision_of("fp8-tensorwise"), first_bf16_layers=0, last_bf16_layers=0)
    yield _refused("no Transformer Engine", _trial_without_engine(size, asked, device, folder / "a"))
    if device != "cuda":
        return
    trial = Trial(settings_of(size, asked, device), folder / "b")
    with without_fp8(trial.replica.chunks):
        trial.step()
    yield _refused("autocast off", trial)
    trial.step()  # now in FP8, as asked for
    yield proved(trial)
    settings = trial.plan.settings
    for case, other in (
        ("another recipe", precision_of("fp8-blockwise")),
        ("a layer too many", dataclasses.replace(asked, first_bf16_layers=1)),
    ):
        trial.plan = dataclasses.replace(trial.plan, settings=dataclasses.replace(settings, precision=other))
        yield _refused(case, trial)


def _trial_without_engine(size: Size, asked: PrecisionSettings, device: str, folder: Path) -> Trial:
    has_engine = compat.has_transformer_engine
    compat.has_transformer_engine = lambda: False
    try:
        trial = Trial(settings_of(size, asked, device), folder)
    finally:
        compat.has_transformer_engine = has_engine
    trial.step()
    return trial


def _refused(case: str, trial: Trial) -> Found:
    """Want the proof to fail."""
    _, label, said, _, _ = proved(trial)
    wrong = [] if said else [f"FP8 was broken on purpose, and the proof for {label} did not notice"]
    reason = "; ".join(said).partition("rank 0")[2][:250]
    return "broken on purpose", case, wrong, f"refused, as it should: rank 0{reason}", {"said": said}
