"""Why each attempt of a run ended: the cause, the evidence, what was done about it, what a person could do.

The supervisor writes the evidence it has into an attempt's outcome. What ranks, srun and the node checks left in
the attempt's folder is added where the outcome does not have it, as in one whose supervisor was lost.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.doubts import alarms, in_words
from orchestrator.errors import OrchestrateError
from orchestrator.events import DamageEvent, GuardEvent, RepeatEvent, ReplicaEvent, read_events
from orchestrator.exit_codes import Cause
from orchestrator.files import read_json
from orchestrator.plan import read_plan
from orchestrator.remedies import advice
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.endings import first_srun_failure, srun_words
from orchestrator.status import AttemptStatus, RunStatus, read_status
from orchestrator.units import format_duration, format_time

T = TypeVar("T")

EXPECTED = (Cause.FINISHED, Cause.TIME_LIMIT, Cause.PREEMPTED, Cause.CANCELLED, Cause.STOPPED)
"""Ends that are nobody's failure."""
SRUN_SAW = (Cause.RANK_KILLED, Cause.OUT_OF_MEMORY, Cause.START_FAILED)
"""Ends that srun sees; after others it tells of ranks that the supervisor killed."""
OFTEN = 2
"""How many failures on one node are no chance any more."""
MANY_PREEMPTIONS = 5
NEWEST_DOUBTS = 5
"""Of an attempt's steps in doubt, those that are shown."""
LOST_SHARE = 0.05
"""Of the wall time; more of it in lost steps is worth shorter intervals between checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """Something that was seen of an end."""

    source: str
    """`rank 3`, `srun`, `slurm`, `node check`, `signal`, `node`, `supervisor`, `storage`, `checkpoint`, `numerics`,
    `file`."""
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """One attempt, explained."""

    status: AttemptStatus
    evidence: tuple[Evidence, ...]
    traceback: str
    """Of the rank that ended it."""
    stacks: str
    """Of all threads of the rank that hung first."""
    findings: tuple[str, ...]
    """Of the node checks, all of them."""
    exit_codes: dict[str, int]
    advice: tuple[str, ...]
    """What a person could do, the likeliest help first."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status.cause != ""

    @property
    def is_failure(self) -> bool:
        """Whether it ended as nobody wanted."""
        return self.is_over and self.status.cause not in EXPECTED


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunExplanation:
    """A run, explained."""

    name: str
    state: str
    reason: str
    next_command: str
    patterns: tuple[str, ...]
    """What the attempts have in common, with what a person could do about that."""
    attempts: tuple[Explanation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
    """What an attempt left in its folder, beside its outcome."""

    failures: tuple[Mapping[str, Any], ...] = ()
    """What failing ranks wrote down, the one that is to blame first."""
    stacks: str = ""
    findings: tuple[str, ...] = ()
    srun: str = ""
    """What srun said."""
    stop_request: str = ""
    """What ranks were asked for, and when."""
    checkpoints: tuple[str, ...] = ()
    """What is wrong with checkpoints or with repeated steps."""
    numerics: tuple[str, ...] = ()
    """Steps whose numbers were in doubt, and replicas that differed."""
    unreadable: tuple[str, ...] = ()


def explain_run(run: RunDirectory) -> RunExplanation:
    """Read a run's folder, ask its scheduler where it stands, and explain its attempts, the oldest first."""
    status = read_status(run)
    cluster = read_plan(run.plan).settings.cluster
    excluded = cluster.slurm.exclude if cluster.scheduler == "slurm" else None
    outcomes = [run.attempt(attempt.number).read_outcome() or {} for attempt in status.attempt_list]
    attempts = tuple(
        explain_attempt(
            status.name,
            attempt,
            outcome,
            read_left(run.attempt(attempt.number), attempt.rank),
            after=after,
            excluded=excluded,
        )
        for attempt, outcome, after in zip(
            status.attempt_list, outcomes, [*status.attempt_list[1:], None], strict=False
        )
    )
    # Who reads this has been here: what is left is to go on.
    is_here = status.next_command == f"orchestrate why {status.name}"
    return RunExplanation(
        name=status.name,
        state=str(status.state),
        reason=status.reason,
        next_command=f"orchestrate resume {status.name}" if is_here else status.next_command,
        patterns=patterns(status, attempts, excluded),
        attempts=attempts,
    )


def read_left(attempt: AttemptDirectory, blamed: int | None = None) -> Left:
    """Return what ranks, srun and node checks left; what cannot be read is named, and hides nothing else.

    Args:
        blamed: the rank that the supervisor found to have ended the attempt, if it did.
    """
    unreadable: list[str] = []

    def whole(path: Path, read: Callable[[Path], T], otherwise: T) -> T:
        try:
            return read(path)
        except FileNotFoundError:
            return otherwise
        except (OrchestrateError, OSError) as error:
            unreadable.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            unreadable.append(f"{path} is not as it should be: {type(error).__name__}: {error}")
        return otherwise

    records = [whole(path, _failure, None) for path in sorted(attempt.failures.glob("rank_*.json"))]
    failures = blamed_first([record for record in records if record is not None], blamed)
    stands = failures[0].get("stands") if failures else None
    return Left(
        failures=tuple(failures),
        stacks=whole(attempt.path / stands["stacks"], _text, "") if stands else "",
        findings=whole(attempt.checks / "choice.json", _findings, ()),
        srun=whole(attempt.srun_log, _text, ""),
        stop_request=whole(attempt.stop_request, _stop_words, ""),
        checkpoints=tuple(words for path in (attempt.events, attempt.supervisor_events) for words in _damage(path)),
        numerics=tuple(_doubts(attempt.events))[-NEWEST_DOUBTS:],
        unreadable=tuple(unreadable),
    )


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def _failure(path: Path) -> Mapping[str, Any] | None:
    """Return what a rank wrote down; that of another version may lack what is not asked for here."""
    record: dict[str, Any] = read_json(path)
    return {**record, "rank": int(record["rank"]), "host": str(record["host"]), "time": float(record["time"]),
            "traceback": str(record["traceback"])}  # fmt: skip


def _findings(path: Path) -> tuple[str, ...]:
    """Return the findings of the node checks as sentences."""
    return tuple(
        f"{found['node']}: {found['check']}: {found['message']}"
        f"{'' if found['excludes'] else ' (it is taken nevertheless)'}; {found['remedy']}"
        for found in read_json(path)["findings"]
    )


def _stop_words(path: Path) -> str:
    request = read_json(path)
    return f"asked the ranks to save and leave at {format_time(float(request['time']))}: {request['reason']}"


def _damage(path: Path) -> Iterator[str]:
    """Yield what is wrong with checkpoints, or with steps that were done again."""
    for _, event in read_events(path):
        if isinstance(event, DamageEvent):
            yield f"{event.name} is damaged, the one before is used: {'; '.join(event.problems[:3])}"
        elif isinstance(event, RepeatEvent) and event.is_beyond_noise:
            yield (
                f"step {event.step}, done again, has loss {event.loss:.6f}, recorded was "
                f"{event.recorded_loss:.6f}: hardware or nondeterminism"
            )


def _doubts(path: Path) -> Iterator[str]:
    """Yield what ranks found of numbers that were not as they should be."""
    events = [event for _, event in read_events(path)]
    for event in events:
        if isinstance(event, GuardEvent | ReplicaEvent):
            yield in_words(event)
    yield from alarms(events)


def blamed_first(failures: Sequence[Mapping[str, Any]], blamed: int | None) -> list[Mapping[str, Any]]:
    """Return what ranks wrote down: the one that is blamed, the others by time, those that only waited last."""

    def order(failure: Mapping[str, Any]) -> tuple[bool, bool, float]:
        return failure["rank"] != blamed, _has_waited(failure), float(failure["time"])

    return sorted(failures, key=order)


def _has_waited(failure: Mapping[str, Any]) -> bool:
    return bool((failure.get("stands") or {}).get("waits_for_others"))


def explain_attempt(
    run: str,
    status: AttemptStatus,
    outcome: Mapping[str, Any],
    left: Left,
    *,
    after: AttemptStatus | None = None,
    excluded: Sequence[str] | None = None,
) -> Explanation:
    """Explain one attempt from what is known of it.

    Args:
        outcome: of its supervisor; empty while there is none.
        after: the next attempt.
        excluded: nodes that the settings exclude already; None without Slurm.
    """
    evidence = _evidence_in(outcome)
    told = {item.source for item in evidence}
    if status.cause:
        evidence += [item for item in _evidence_in_files(status, left) if item.source not in told]
    if status.cause and not outcome:
        evidence += _evidence_of_loss(status, after)
    node = status.host if excluded is not None and status.host else None
    return Explanation(
        status=status,
        evidence=tuple(evidence),
        traceback=str(left.failures[0]["traceback"]).rstrip() if left.failures else "",
        stacks=left.stacks.rstrip(),
        findings=left.findings,
        exit_codes={str(rank): int(code) for rank, code in outcome.get("exit_codes", {}).items()},
        advice=advice(
            Cause(status.cause),
            run=run,
            attempt=status.number,
            rank=status.rank,
            node=node,
            without_node=None if node is None or excluded is None else _without_nodes({*excluded, node}),
            job=status.job_id if excluded is not None else None,
        )
        if status.cause
        else (),
    )


def patterns(status: RunStatus, attempts: Sequence[Explanation], excluded: Sequence[str] | None) -> tuple[str, ...]:
    """Return what attempts have in common that one of them alone does not show."""
    found: list[str] = []
    ended = [attempt for attempt in attempts if attempt.is_over]
    failures = [attempt.status for attempt in ended if attempt.is_failure]
    hosts = Counter(failure.host for failure in failures if failure.host and failure.host not in (excluded or ()))
    often = {node: count for node, count in hosts.most_common() if count >= OFTEN}
    if often and excluded is not None:
        counts = ", ".join(f"{count} on {node}" for node, count in often.items())
        found.append(
            f"of {len(failures)} failures {counts}: tell the site, and keep them out with "
            f"`orchestrate resume {status.name} {_without_nodes({*excluded, *often})}`"
        )
    for one, other in itertools.pairwise(failures):
        if one.number + 1 == other.number and one.last_step == other.last_step and one.last_step is not None:
            where = "on the same node" if one.host == other.host else "on different nodes, so that these are hardly it"
            found.append(
                f"attempts {one.number} and {other.number} both failed after step {one.last_step}, {where}: look at "
                f"the data and the code of step {one.last_step + 1}"
            )
            break
    preempted = len(ended)
    while preempted and ended[preempted - 1].status.cause == Cause.PREEMPTED:
        preempted -= 1
    if len(ended) - preempted >= MANY_PREEMPTIONS:
        found.append(
            f"the last {len(ended) - preempted} attempts were all preempted: ask for a QOS or partition that is not "
            f"(`cluster.slurm.qos`, `cluster.partition`)"
        )
    lost, total = status.ledger.seconds["lost"], status.ledger.total_seconds
    if lost > LOST_SHARE * total and len(failures) >= OFTEN:
        found.append(
            f"{lost / total:.0%} of the time went into steps that were lost: save more often, "
            f"`orchestrate resume {status.name} checkpoint.interval_steps=N`"
        )
    return tuple(found)


def stretches(attempts: Sequence[Explanation]) -> list[tuple[Explanation, ...]]:
    """Return attempts in runs that ended alike and were followed by the same."""
    found: list[tuple[Explanation, ...]] = []
    for attempt in attempts:
        last = found[-1][-1].status if found else None
        if last is not None and (last.cause, last.action) == (attempt.status.cause, attempt.status.action):
            found[-1] = (*found[-1], attempt)
        else:
            found.append((attempt,))
    return found


def _evidence_in(outcome: Mapping[str, Any]) -> list[Evidence]:
    return [Evidence(source=str(item["source"]), text=str(item["text"])) for item in outcome.get("evidence", ())]


def _evidence_in_files(status: AttemptStatus, left: Left) -> list[Evidence]:
    """Return what an attempt's files say of its end."""
    found: list[Evidence] = []
    if left.failures:
        first, *others = left.failures
        found.append(Evidence(source=f"rank {first['rank']}", text=_failure_words(first)))
        if others:
            ranks = ", ".join(str(failure["rank"]) for failure in others[:8]) + (", ..." if len(others) > 8 else "")
            waiting = sum(map(_has_waited, others))
            what = "waited for it" if waiting == len(others) else "told of a failure as well"
            what += f", {waiting} of them waited for others" if 0 < waiting < len(others) else ""
            found.append(Evidence(source="other ranks", text=f"{len(others)} ({ranks}) {what}"))
    if left.stop_request:
        found.append(Evidence(source="signal", text=left.stop_request))
    failure = first_srun_failure(left.srun)
    words = srun_words(left.srun)
    is_witness = status.cause in SRUN_SAW or (failure is not None and failure.rank is None)
    if failure is not None and is_witness:
        of_rank = "" if failure.rank is None else f"rank {failure.rank} on "
        found.append(Evidence(source="srun", text=f"{of_rank}{failure.host}: {failure.what}"))
    elif words and is_witness:
        found.append(Evidence(source="srun", text=words))
    found += [Evidence(source="node check", text=finding) for finding in left.findings]
    found += [Evidence(source="checkpoint", text=text) for text in left.checkpoints]
    found += [Evidence(source="numerics", text=text) for text in left.numerics]
    return found + [Evidence(source="file", text=text) for text in left.unreadable]


def _evidence_of_loss(status: AttemptStatus, after: AttemptStatus | None) -> list[Evidence]:
    """Return what tells of an end that nobody wrote down."""
    heard = "was never heard" if status.ended is None else f"was heard last at {format_time(status.ended)}"
    found = [Evidence(source="supervisor", text=f"it {heard}, and wrote no outcome")]
    if after is not None and after.started is not None:
        later = f"attempt {after.number} began at {format_time(after.started)}"
        if after.job_id == status.job_id and after.restart_count > status.restart_count:
            text = f"job {after.job_id} was started again (restart {after.restart_count})"
            found.append(Evidence(source="slurm", text=f"{text}: its node failed, or it was requeued; {later}"))
        else:
            found.append(Evidence(source="run", text=f"{later} in job {after.job_id}"))
    return found


def _failure_words(failure: Mapping[str, Any]) -> str:
    """Return what a rank wrote down, in a line."""
    step = "before the first step" if failure.get("step") is None else f"after step {failure['step']}"
    stands = failure.get("stands")
    if stands:
        who = "waiting for others, " if stands["waits_for_others"] else ""
        record = f", NCCL's flight record in {stands['flight_record']}" if stands.get("flight_record") else ""
        seconds = format_duration(float(stands["seconds"]))
        return (
            f"on {failure['host']}, {step}: stood {seconds} in its {stands['phase']}, "
            f"{who}at {stands['at']}; stacks of its threads in {stands['stacks']}{record}"
        )
    said = " ".join(str(failure.get("message", "")).split())
    frames = [line.strip() for line in str(failure["traceback"]).splitlines() if line.strip().startswith('File "')]
    raised = f", raised in {frames[-1]}" if frames else ""
    return f"on {failure['host']}, {step}: {failure.get('error', 'an error')}: {said}{raised}"


def _without_nodes(nodes: set[str]) -> str:
    """Return the override that excludes nodes, as a shell takes it."""
    names = sorted(nodes)
    value = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    return f"cluster.slurm.exclude={value}" if len(names) == 1 else f"'cluster.slurm.exclude={value}'"
