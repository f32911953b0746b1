"""What each cause of end means, what a run does about it by itself, what is lost, and what a person could do. Pure.

`docs/faults.md` has the same sentences for who reads before anything has happened; a test keeps the two together.
"""

import dataclasses
import re
from collections.abc import Mapping

from orchestrator.exit_codes import Cause

NOTHING = "Nothing."
SINCE_THE_LAST = "The steps since the last complete checkpoint, at most one interval of them."
RESUME = "`orchestrate resume {run}` goes on from the newest complete checkpoint"
KEEP_OUT = "`orchestrate resume {run} {without_node}` keeps that node out"
RECORD = "ask Slurm what it knows, where it keeps accounts: `sacct -X -D -j {job} -o jobid,state,exitcode,nodelist,end`"
RESTARTED = (
    "Ranks start again in the same allocation from the newest complete checkpoint. Where too few good nodes are left "
    "there, the job is requeued."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """One cause, for people."""

    meaning: str
    by_itself: str
    lost: str
    actions: tuple[str, ...]
    """What a person could do, the likeliest help first; names in braces are filled in."""


REMEDIES: Mapping[Cause, Remedy] = {
    Cause.FINISHED: Remedy(
        meaning="All steps are done, and the last checkpoint is complete.",
        by_itself="It ends.",
        lost=NOTHING,
        actions=(
            "`orchestrate export {run} --output DIR` writes the model as a Hugging Face folder",
            "`orchestrate resume {run} tokens=3e10` prolongs the run",
        ),
    ),
    Cause.TIME_LIMIT: Remedy(
        meaning="The job's time limit was near: `cluster.warning_seconds` before it, or its end.",
        by_itself="All ranks save at one step and leave, and the job is requeued, or a successor submitted where the "
        "site requeues none.",
        lost="Nothing, where a step and a save fit into the warning; otherwise the steps since the last complete "
        "checkpoint.",
        actions=(
            "nothing need be done as long as it saves and goes on",
            "where a save was cut off, stop it and `orchestrate resume {run} cluster.warning_seconds=900`",
        ),
    ),
    Cause.PREEMPTED: Remedy(
        meaning="Slurm wanted the nodes for a job of more weight, or an administrator requeued the job.",
        by_itself="All ranks save at one step and leave, and the job is requeued. Preemptions are counted apart: "
        "`max_preemptions_without_progress` in a row that saved nothing new stop the run.",
        lost="Nothing, where a step and a save fit into what Slurm leaves before its KILL; otherwise the steps since "
        "the last complete checkpoint.",
        actions=(
            "nothing need be done as long as it saves and goes on",
            "where it comes to no save in between: a QOS or partition that is not preempted, or shorter intervals, "
            "`orchestrate resume {run} checkpoint.interval_steps=100`",
        ),
    ),
    Cause.CANCELLED: Remedy(
        meaning="A person cancelled it, with `orchestrate cancel` or `scancel`; also a TERM of Slurm that it could "
        "not be asked about.",
        by_itself="It saves if there is time, ends, and never comes back by itself.",
        lost=NOTHING[:-1] + ", where there was time to save.",
        actions=(RESUME,),
    ),
    Cause.STOPPED: Remedy(
        meaning="A process of a run without Slurm was told to end (SIGTERM), by a person or by a machine that shuts "
        "down.",
        by_itself="It saves and ends.",
        lost=NOTHING[:-1] + ", where there was time to save.",
        actions=(RESUME,),
    ),
    Cause.RANK_KILLED: Remedy(
        meaning="A rank was ended by a signal (SIGKILL, SIGSEGV, SIGBUS) and could say nothing.",
        by_itself=f"Its peers are ended within seconds and its node is checked again. {RESTARTED}",
        lost=SINCE_THE_LAST,
        actions=(
            "read what the rank printed last: `orchestrate logs {run} --attempt {attempt} --rank {rank}`",
            "look at the kernel's log of {node} for Xid, MCE or OOM lines: `dmesg -T`",
            "killed by nobody you know of: look for a limit of memory (`cluster.slurm.memory`), and for others' jobs",
            "if it is that node again and again, " + KEEP_OUT,
            RECORD,
        ),
    ),
    Cause.HANG: Remedy(
        meaning="A rank stood still for longer than `patience` allows for what it did: its start, a step, a "
        "validation, a save.",
        by_itself="It leaves the stacks of all its threads, on GPUs NCCL's flight record too, and ends with a code of "
        f"its own; its node is checked again. {RESTARTED}",
        lost=SINCE_THE_LAST + " And the time until the limit.",
        actions=(
            "see where it stood, in the stacks of `orchestrate why {run} --attempt {attempt}`: reading data is the "
            "disk's, a collective the network's or a peer's, anything else the code's",
            "if it was only slow, give the phase more time: `orchestrate resume {run} patience.step_seconds=1800` "
            "(start_seconds, validation_seconds, save_seconds)",
            "if it is that node again and again, " + KEEP_OUT,
        ),
    ),
    Cause.OUT_OF_MEMORY: Remedy(
        meaning="An allocation on the device failed, or a rank was killed for its node's or job's memory.",
        by_itself="Ranks start again from the newest complete checkpoint, if there was progress since the start; "
        "otherwise the run stops, since it would not fit again.",
        lost=SINCE_THE_LAST,
        actions=(
            "on the device: `orchestrate resume {run} layout.micro_batch_size=1`, or a larger "
            "`layout.tensor_parallel`; `orchestrate plan` shows the memory of a layout",
            "on the node: give the job all of it, `orchestrate resume {run} cluster.slurm.memory=0`",
            "if it came after days, something grows: read `orchestrate logs {run} --attempt {attempt} --rank {rank}`",
        ),
    ),
    Cause.START_FAILED: Remedy(
        meaning="srun could not start the ranks: an option that the site does not know, a container that is not "
        "there, no free port.",
        by_itself=RESTARTED,
        lost="Nothing but the time.",
        actions=(
            "read srun's words below, mend `cluster.slurm` or `cluster.container`, then `orchestrate resume {run}`",
            "see the line as it is sent: `orchestrate resume {run} --dry-run`",
        ),
    ),
    Cause.NODE_FAILED: Remedy(
        meaning="Nothing is heard of a node any more, or Slurm has lost it.",
        by_itself="Ranks start again in the same allocation on a spare node (`cluster.spare_nodes`); without one a "
        "successor job is submitted that excludes the node. Where it was the first node, and the supervisor died with "
        "it, an agent on another does that after a minute.",
        lost=SINCE_THE_LAST,
        actions=(
            "tell the site about {node}: `scontrol show node {node}`",
            "ask for spares, which save the queue's time: `orchestrate resume {run} cluster.spare_nodes=1`",
            RECORD,
        ),
    ),
    Cause.NODE_CHECK: Remedy(
        meaning="Too few nodes of the allocation passed their checks.",
        by_itself="A successor job is submitted that excludes the nodes that failed. Counted with the preemptions.",
        lost="Nothing but the time.",
        actions=(
            "read the findings, each of which names its remedy: `orchestrate why {run} --attempt {attempt}`",
            "if a limit is wrong for this site: `orchestrate resume {run} cluster.checks.limits.NAME=VALUE`",
            "ask for spares: `orchestrate resume {run} cluster.spare_nodes=2`",
        ),
    ),
    Cause.EXCEPTION: Remedy(
        meaning="A rank met an error in code, data or libraries, and wrote its traceback down.",
        by_itself="It stops: the same would come again.",
        lost=SINCE_THE_LAST,
        actions=(
            "read the traceback from its last line up; what the rank printed before is in `orchestrate logs {run} "
            "--attempt {attempt} --rank {rank}`",
            "mend its cause, then `orchestrate resume {run}`; that runs the run's own copy of the code, and with "
            "`--allow-upgrade` the installed one, where its version is another",
        ),
    ),
    Cause.NOT_FINITE: Remedy(
        meaning="A batch gave no finite loss or gradients, gave the same again, and `numerics` allows no skip or no "
        "further one.",
        by_itself="It stops before its gradients are applied. Up to `numerics.max_skipped_steps` such batches in "
        "`numerics.window` steps are skipped before it comes to that, unless `numerics.on_not_finite` is `stop`.",
        lost=SINCE_THE_LAST,
        actions=(
            "look at the last steps: `orchestrate logs {run} --attempt {attempt}`, and at the curve: `orchestrate ui`",
            "read the step's documents, if it is one batch alone: `orchestrate data show {run} --step STEP`",
            "go on with a lower rate: `orchestrate resume {run} training.learning_rate=1e-5`",
            "or from further back, as another run: `orchestrate launch --from {run}@STEP name=NAME`",
        ),
    ),
    Cause.SPIKE: Remedy(
        meaning="A batch gave a loss or a gradient norm far above those before (`numerics.spike_score`), gave the same "
        "again, and `numerics` allows no skip or no further one.",
        by_itself="It stops before its gradients are applied. Up to `numerics.max_skipped_steps` such batches in "
        "`numerics.window` steps are skipped before it comes to that, or what else `numerics.on_spike` says.",
        lost=SINCE_THE_LAST,
        actions=(
            "look at the curve: `orchestrate ui`; where it has risen for good, the data or the rate has changed",
            "read the step's documents, if it is one batch alone: `orchestrate data show {run} --step STEP`",
            "apply such batches all the same: `orchestrate resume {run} numerics.on_spike=record`",
            "or go back to a checkpoint at each: `orchestrate resume {run} numerics.on_spike=rollback`",
        ),
    ),
    Cause.HARDWARE: Remedy(
        meaning="A rank computed wrongly: the same step from the same state gave other numbers, or the weights of "
        "data-parallel replicas were not the same.",
        by_itself="The first such step of a node is taken as it came out the second time, and the run goes on; with "
        "`numerics.max_hardware_events` of them, or where weights differ, it ends before that state is saved. Ranks "
        "start again from the newest complete checkpoint without the node, on a spare or in a further job.",
        lost=SINCE_THE_LAST,
        actions=(
            "have {node} tested and its log read for Xid and ECC errors before it gets any work: `dmesg -T`",
            "where replicas differ and no majority says which is right, or no rank could be named, the next attempts "
            "tell: `orchestrate why {run}`",
            "to keep it out for good, " + KEEP_OUT,
            "if no node is bad, something is not deterministic: see `training.deterministic`",
        ),
    ),
    Cause.PRECISION: Remedy(
        meaning="FP8 was asked for and did not run on every rank, or ran in layers that should be in bf16.",
        by_itself="It stops before any step of the attempt is saved, and never goes on in bf16 by itself.",
        lost="The first step of the attempt, whose result nobody asked for.",
        actions=(
            "read which rank and which module it was, what was wanted and what was found: `orchestrate why {run}`",
            "mend the workers' environment: `docs/clusters.md` has the versions that belong together, then "
            "`orchestrate resume {run}`",
            "or go on in bf16 from the same weights: `orchestrate resume {run} precision=bf16`",
        ),
    ),
    Cause.BAD_DATA: Remedy(
        meaning="A data set is missing, damaged, or not the one that the run began with.",
        by_itself="It stops: nothing else is trained on in its place.",
        lost=SINCE_THE_LAST,
        actions=("bring the named files back as they were, then `orchestrate resume {run}`",),
    ),
    Cause.BAD_CONFIG: Remedy(
        meaning="What was asked for cannot be run, and only a rank could find that out.",
        by_itself="It stops.",
        lost=SINCE_THE_LAST,
        actions=("mend the value that the message names: `orchestrate resume {run} SECTION.FIELD=VALUE`",),
    ),
    Cause.BAD_CHECKPOINT: Remedy(
        meaning="No checkpoint could be loaded: all are damaged, or of another model.",
        by_itself="A damaged checkpoint is named and the one before is used. Only where none is whole it stops: no "
        "other weights are taken in their place.",
        lost="What the damaged checkpoints held.",
        actions=(
            "bring a checkpoint back from a copy into the run's `checkpoints/`, then `orchestrate resume {run}`",
            "find out why the disk gives other bytes than were written, before anything else is saved there",
        ),
    ),
    Cause.DISK_FULL: Remedy(
        meaning="There was no room, or no quota, for a checkpoint.",
        by_itself="It stops, and keeps the last complete checkpoint.",
        lost=SINCE_THE_LAST,
        actions=(
            "free space or raise the quota, then `orchestrate resume {run}`",
            "or keep fewer checkpoints: `orchestrate resume {run} checkpoint.keep_last=2`",
        ),
    ),
    Cause.STORAGE: Remedy(
        meaning="The file system of the run's folder failed, or did not answer, for longer than "
        "`patience.storage_seconds`.",
        by_itself="It waits so long, then ends the ranks and starts them again when the folder answers. Counted with "
        "the preemptions.",
        lost=SINCE_THE_LAST,
        actions=(
            "ask the site about the file system; nothing need be done here once it is back",
            "if it goes away for longer now and then: `orchestrate resume {run} patience.storage_seconds=900`",
        ),
    ),
    Cause.SUPERSEDED: Remedy(
        meaning="Another supervisor took the run over: this one's node was thought lost, and lived on.",
        by_itself="It ends its ranks and marks no checkpoint any more; the run goes on under the other.",
        lost="What these ranks did since the last complete checkpoint; the other supervisor has done it again.",
        actions=("see where the run stands: `orchestrate status {run}`",),
    ),
    Cause.SUPERVISOR_FAILED: Remedy(
        meaning="The supervisor met an error of its own, and wrote it down.",
        by_itself="The job is requeued, once; after the same again without progress the run stops.",
        lost=SINCE_THE_LAST,
        actions=(
            "read what it said: `orchestrate logs {run} --supervisor`",
            RESUME,
        ),
    ),
    Cause.SUPERVISOR_LOST: Remedy(
        meaning="The supervisor was killed, or its node died, before it could say why.",
        by_itself="Its ranks end with it. Where Slurm has noticed, it requeues the job and the run goes on; otherwise "
        "nothing happens until a person acts.",
        lost=SINCE_THE_LAST,
        actions=(
            RESUME,
            RECORD,
            "read what it said last: `orchestrate logs {run} --supervisor`",
        ),
    ),
}


def advice(cause: Cause, **known: object) -> tuple[str, ...]:
    """Return what a person could do about an end.

    Args:
        known: run, attempt, rank, node, job, and without_node, an override that excludes the node; what needs a fact
            that is None is left out.
    """
    facts = {name: value for name, value in known.items() if value not in (None, "")}
    return tuple(
        action.format(**facts)
        for action in REMEDIES[cause].actions
        if set(re.findall(r"{(\w+)}", action)) <= facts.keys()
    )
