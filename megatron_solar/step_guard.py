"""A guard between a step's gradients and the optimizer: what is out of the ordinary is computed again, then decided on.

The same step from the same state gives the same numbers: bit for bit on the CPU and with `training.deterministic`,
within `repeats.NOISE` otherwise. Another result the second time is hardware: the ranks whose own results differed are
named (`evidence.py`), the second result is taken, and the node is left at the next start. The same result is the data:
its gradients are dropped, or also the steps since the newest checkpoint are taken back, or the run stops, as
`numerics.on_not_finite` and `numerics.on_spike` say. Step numbers and samples never go back.

Every rank decides for itself, from the loss and the norm that an all-reduce has made the same on all of them, and
from what all of them tell each other about a step in doubt.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed

from megatron_solar.checkpoint import CheckpointWriter
from megatron_solar.data import Samples
from megatron_solar.evidence import Blame, Evidence, RankEvidence, blame, is_same
from megatron_solar.fp8_state import Scales, put_back, scales_of
from megatron_solar.hang_watch import HangWatch, Phase
from megatron_solar.one_step import StepResult, compute_step
from megatron_solar.replica import Replica
from megatron_solar.run_state import Trajectory, agreed_checkpoints, load_state, wait_for_marker
from megatron_solar.telling import EventWriter
from orchestrator.checkpoints import Checkpoint, checkpoint_name, parse_name
from orchestrator.errors import CheckpointError, HardwareError, NotFiniteError, NumericsError, SpikeError
from orchestrator.events import GuardEvent
from orchestrator.plan import TrainingPlan
from orchestrator.repeats import noise
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.spikes import Recent, Suspicion, interventions, new_levels, suspicion


class StepGuard:
    """Computes steps, and says of each whether its gradients are to be applied."""

    def __init__(
        self,
        run: RunDirectory,
        attempt: AttemptDirectory,
        plan: TrainingPlan,
        replica: Replica,
        samples: Samples,
        writer: CheckpointWriter,
        hosts: Sequence[str],
        tell: EventWriter,
        watch: HangWatch,
        loaded: Checkpoint | None,
    ) -> None:
        """Go on with what a checkpoint knows of the steps before it.

        Args:
            hosts: of all ranks, in their order.
        """
        self._run = run
        self._attempt = attempt
        self._plan = plan
        self._replica = replica
        self._samples = samples
        self._writer = writer
        self._hosts = hosts
        self._tell = tell
        self._watch = watch
        self._newest = loaded.name if loaded is not None else ""
        self._skipped = loaded.facts.skipped if loaded is not None else ()
        self._recent = _recent(loaded) if loaded is not None else Recent()
        self._levels = new_levels(plan)
        self._evidence = Evidence(replica.chunks)
        self._noise = noise(plan, plan) or 0.0
        self._has_scales = plan.settings.precision.fp8 == "delayed"
        self._scales: Scales = []
        """Of delayed scaling before the step, which are of the state that it is computed again from."""
        self._wrong: Counter[str] = Counter()
        """Steps that each host has computed wrongly."""

    def compute(self, step: int) -> StepResult:
        """Compute the step after `step`; collective.

        Raises:
            NotFiniteError, SpikeError: the batch gives what the settings do not let pass.
            HardwareError: a rank computes wrongly again and again.
            CheckpointError: a rollback found no whole checkpoint.
        """
        if step + 1 in self._levels:
            self._recent = Recent()
        if self._has_scales:
            self._scales = scales_of(self._replica.chunks)
        result = self._compute(step)
        doubt = suspicion(self._recent, result.loss, result.gradient_norm, self._plan.settings.numerics)
        if doubt is not None:
            result = self._settle(step, result, doubt)
        if result.is_applied:
            window = self._plan.settings.numerics.window
            self._recent = self._recent.after(result.loss, result.gradient_norm, window)
        else:
            put_back(self._scales)  # an outlier that is not trained on would scale the next 1024 steps
        return result

    def fill_histories(self, step: int) -> None:
        """Compute the first step of an attempt for what delayed scaling learns of it alone; collective.

        Histories are not in a checkpoint, and with the scales of 1 that modules begin with, gradients are cast to zero.
        Never run on a GPU.
        """
        if self._has_scales:
            self._compute(step)

    def at_save(self, step: int) -> Trajectory:
        """Return what a checkpoint of this step keeps of the steps before; it is the newest one from here on."""
        self._newest = checkpoint_name(step, self._attempt.number)
        return Trajectory(skipped=self._skipped, recent_losses=self._recent.losses, recent_norms=self._recent.norms)

    def _compute(self, step: int) -> StepResult:
        return compute_step(self._plan, self._attempt, self._replica, self._samples, self._evidence, step)

    def _settle(self, step: int, result: StepResult, doubt: Suspicion) -> StepResult:
        """Compute a step in doubt again, and do what follows from both results."""
        first = self._evidence.told()
        put_back(self._scales)
        again = self._compute(step)
        second = self._evidence.told()
        event = GuardEvent(
            time=time.time(),
            step=step + 1,
            doubt=doubt.doubt,
            score=doubt.score,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            again_loss=again.loss,
            again_norm=again.gradient_norm,
            origin="data",
            action="record",
            first_sample=self._plan.consumed_samples(step),
            samples=self._plan.consumed_samples(step + 1) - self._plan.consumed_samples(step),
        )
        is_alike = is_same(result.loss, again.loss, self._noise)
        if is_alike and is_same(result.gradient_norm, again.gradient_norm, self._noise):
            return self._settle_data(step, again, doubt, event)
        return self._settle_hardware(again, event, self._blame(first, second))

    def _blame(self, first: RankEvidence, second: RankEvidence) -> Blame:
        everyone: list[Any] = [None] * self._plan.layout.world_size
        torch.distributed.all_gather_object(everyone, (first, second))
        before, after = zip(*everyone, strict=True)
        return blame(before, after, self._plan.layout, self._noise)

    def _settle_hardware(self, again: StepResult, event: GuardEvent, found: Blame) -> StepResult:
        """Take the second result, unless it is no good either, or the same node was wrong before."""
        numerics = self._plan.settings.numerics
        hosts = tuple(dict.fromkeys(self._hosts[rank] for rank in found.ranks))
        event = dataclasses.replace(event, origin="hardware", ranks=found.ranks, hosts=hosts, differs=found.differs)
        self._wrong.update(hosts)
        is_good = suspicion(self._recent, again.loss, again.gradient_norm, numerics) is None
        is_first = all(self._wrong[host] < numerics.max_hardware_events for host in hosts)
        self._tell(dataclasses.replace(event, action="repeat" if is_good and is_first else "stop"))
        if is_good and is_first:
            return again
        named = f"rank {', '.join(map(str, found.ranks))} on {', '.join(hosts)} ({found.differs})"
        who = named if found.ranks else "no rank for certain"
        raise HardwareError(
            f"step {event.step} should give the same numbers from the same state, and gave loss {event.loss} with "
            f"gradient norm {event.gradient_norm}, then {event.again_loss} with {event.again_norm}; to blame: {who}; "
            "keep the node out and have it tested",
            found.ranks,
            hosts,
        )

    def _settle_data(self, step: int, again: StepResult, doubt: Suspicion, event: GuardEvent) -> StepResult:
        """Do what the settings say of a batch that gives such numbers."""
        numerics = self._plan.settings.numerics
        action = numerics.on_spike if doubt.doubt.is_spike else numerics.on_not_finite
        if action == "record":
            self._tell(event)
            return again
        decided = interventions(self._skipped, step + 1, numerics.window)
        is_too_often = action != "stop" and decided >= numerics.max_skipped_steps
        if action == "stop" or is_too_often:
            self._tell(dataclasses.replace(event, action="stop"))
            raise self._refusal(doubt, event, decided if is_too_often else None)
        span = (step + 1, step + 1)
        checkpoint = ""
        if action == "rollback":
            self._watch.enter(Phase.START, step)  # which loads a checkpoint as well
            loaded = self._roll_back()
            checkpoint, span = loaded.name, (loaded.step + 1, step + 1)
            is_past = any(loaded.step < level <= step + 1 for level in self._levels)
            self._recent = Recent() if is_past else _recent(loaded)
        self._skipped = (*self._skipped, span)
        self._tell(dataclasses.replace(event, action=action, skipped=span, checkpoint=checkpoint))
        return dataclasses.replace(again, is_applied=False)

    def _refusal(self, doubt: Suspicion, event: GuardEvent, decided: int | None) -> NumericsError:
        """Return the error of a run that stops at a batch."""
        last = event.first_sample + event.samples - 1
        far = "" if doubt.score is None else f", {doubt.score:.1f} robust deviations above the steps before"
        often = "" if decided is None else f"; {decided} skips or rollbacks in numerics.window steps are allowed"
        message = (
            f"{doubt.doubt.replace('_', ' ')} at step {event.step}, twice from the same state: loss {event.loss}, "
            f"gradient norm {event.gradient_norm}{far} (samples {event.first_sample} to {last}); the weights are those "
            f"of step {event.step - 1}{often}; look at the data (`orchestrate data show`), lower the rate, or see "
            "numerics.on_not_finite and numerics.on_spike"
        )
        return SpikeError(message) if doubt.doubt.is_spike else NotFiniteError(message)

    def _roll_back(self) -> Checkpoint:
        """Load the newest checkpoint of this trajectory in place of the weights; collective.

        It is the last one that was begun, so that a repetition of these steps goes back to the same; the supervisor
        marks it once all ranks have written their part.
        """
        self._writer.wait()
        place = parse_name(self._newest)
        if place is None:
            raise CheckpointError(f"run {self._run.name} has no checkpoint to go back to")
        wait_for_marker(self._run.checkpoint_path(self._newest))
        candidates = [each for each in agreed_checkpoints(self._run, self._tell) if each.step <= place[0]]
        if not candidates:
            raise CheckpointError(f"{self._newest} was not marked as complete, and no earlier one is there")
        return load_state(candidates, self._replica, self._tell)


def _recent(checkpoint: Checkpoint) -> Recent:
    return Recent(losses=checkpoint.facts.recent_losses, norms=checkpoint.facts.recent_norms)
