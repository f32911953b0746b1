"""What ended the ranks of an attempt: the first that failed, with its host and step, never the largest exit code.

srun's own exit code is the largest of all ranks', so that a root cause drowns in the 137 of those that were
killed because of it. What the failing rank wrote down is believed first, then what srun said first, then codes.
"""

import dataclasses
import re
import signal
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from orchestrator import exit_codes
from orchestrator.exit_codes import CAUSE_OF_CODE, Cause


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptEnding:
    """What was seen of the end of one attempt."""

    cause: Cause
    message: str
    rank: int | None = None
    host: str | None = None
    exit_codes: Mapping[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SrunFailure:
    """The first failure that srun told of."""

    host: str
    rank: int | None
    """None where it says nothing of a rank: a node that Slurm has lost."""
    what: str


_TASK = re.compile(r"^srun: error: ([^\s:]+): tasks? ([0-9]+)[-,0-9]*: (.+?)\s*$", re.MULTILINE)
_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
_LAUNCH = re.compile(r"^srun: error: Task launch for \S+ failed on node ([^\s:]+): (.+?)\s*$", re.MULTILINE)
_OUT_OF_MEMORY = re.compile(
    r"^(?:srun|slurmstepd\S*): error: .*?((?:Detected \d+ )?oom.kill.*?|Out Of Memory)\s*$",
    re.MULTILINE | re.IGNORECASE,
)
_PHASES = {"start": "its start", "step": "a step", "validation": "a validation", "save": "a save"}
_WORDS = re.compile(r"^(?:srun|slurmstepd): (?:error|fatal): (.+?)\s*$|^srun: (unrecognized option .+)$", re.MULTILINE)


def first_srun_failure(log: str) -> SrunFailure | None:
    """Find the first failure in what srun printed of which no rank could write a record.

    The log should be of a moment soon after the first failure: KillWait later srun kills the others itself.
    """
    node = _NODE.search(log)
    launch = _LAUNCH.search(log)
    if launch is not None:
        return SrunFailure(host=launch.group(1), rank=None, what=f"no rank could be started on it: {launch.group(2)}")
    task = next((found for found in _TASK.finditer(log) if not _is_explained(found.group(3))), None)
    # Slurm kills the other ranks of a step that has lost a node, and srun may tell of them first.
    if node is not None and (task is None or node.start() < task.start() or task.group(3) == "Killed"):
        return SrunFailure(host=node.group(1), rank=None, what="Slurm has lost the node")
    if task is None:
        return None
    what, memory = task.group(3), _OUT_OF_MEMORY.search(log)
    if what == "Killed" and memory is not None:  # who was killed and why stand in two lines
        what = f"{what}: {memory.group(1)}"
    return SrunFailure(host=task.group(1), rank=int(task.group(2)), what=what)


def srun_words(log: str) -> str:
    """Return the first error that srun told of, whatever it is."""
    found = _WORDS.search(log)
    return "" if found is None else found.group(1) or found.group(2)


def _is_explained(what: str) -> bool:
    """Whether a rank ended with a code of its own, of which there is a record, or by the TERM that srun sends peers."""
    code = re.fullmatch(r"Exited with exit code ([0-9]+)", what)
    return what == "Terminated" or (code is not None and int(code.group(1)) in (*range(128), 128 + signal.SIGTERM))


def explain_ending(
    records: Sequence[Mapping[str, Any]],
    first: Mapping[int, int],
    codes: Mapping[int, int],
    *,
    asked: Cause | None,
    srun: SrunFailure | None = None,
    words: str = "",
    is_killed_late: bool = False,
    host: str,
    world_size: int = 1,
    ranks_on: Sequence[str] = (),
    killed_for_memory: Mapping[str, str] = MappingProxyType({}),
) -> AttemptEnding:
    """Say what ended an attempt.

    Args:
        records: what failing ranks wrote down, the earliest first.
        first: exit codes when the first failure was seen; under Slurm srun's own, as of rank 0, if it had ended.
        codes: all exit codes.
        asked: the reason of the stop request, or None.
        srun: the first failure that srun told of, before anybody killed ranks.
        words: the first error of srun, where ranks are started by it.
        is_killed_late: whether ranks that were asked to stop were killed for being late.
        host: of local ranks.
        world_size: how many ranks there were; of those that hang some may tell nothing.
        ranks_on: nodes in the order of ranks; nothing for local ranks.
        killed_for_memory: in words by node, where processes were killed for their memory.
    """
    # A rank that knows its cause is believed before any signal: those that wait for a failed rank are killed
    # or lose their connection, or tell that they have waited for too long.
    hung = [record for record in records if record["exit_code"] == exit_codes.HANG]
    known = [record for record in records if record["exit_code"] not in (exit_codes.EXCEPTION, exit_codes.HANG)]
    known += [record for record in hung if not _waits(record)]
    is_srun = bool(ranks_on)  # its code, the largest, tells of no single rank; after a hang it is that of our own kill
    killed = [] if known or (hung and is_srun) else [rank for rank, code in sorted(first.items()) if code > 128]
    if words and not records and srun is None and asked is None and set(codes.values()) - {exit_codes.FINISHED}:
        # Also srun's 255 for what it refuses, which is no signal.
        return AttemptEnding(cause=Cause.START_FAILED, message=f"srun: {words}", exit_codes=codes)
    if asked is not None and (killed or is_killed_late or (srun is not None and not known)):
        message = f"asked to stop ({asked}), ended before it could save"
        return AttemptEnding(cause=asked, message=message, exit_codes=codes)
    if not known:
        ending = _killed_for_memory({} if is_srun else first, srun, host, killed_for_memory)
        if ending is not None:
            return dataclasses.replace(ending, exit_codes=codes)
    if srun is not None and srun.rank is None and not known:
        return AttemptEnding(cause=Cause.NODE_FAILED, message=f"node {srun.host}: {srun.what}", host=srun.host,
                             exit_codes=codes)  # fmt: skip
    if srun is not None and not known:
        message = f"rank {srun.rank} on {srun.host} ended without a word: {srun.what}"
        return AttemptEnding(cause=Cause.RANK_KILLED, message=message, rank=srun.rank, host=srun.host,
                             exit_codes=codes)  # fmt: skip
    if killed:
        message = f"rank {killed[0]} was killed by {_signal_name(first[killed[0]] - 128)}"
        return AttemptEnding(cause=Cause.RANK_KILLED, message=message, rank=killed[0], host=host, exit_codes=codes)
    if hung and (not known or known[0] in hung):
        told = {int(record["rank"]) for record in records}
        if not is_srun:
            told |= {rank for rank, code in codes.items() if code in (exit_codes.FINISHED, exit_codes.SAVED_AND_LEFT)}
        nodes = ranks_on or [host]
        silent = {rank: nodes[rank * len(nodes) // world_size] for rank in range(world_size) if rank not in told}
        ending = _hang(hung, silent)
        return dataclasses.replace(ending, exit_codes=codes)
    if known and known[0]["exit_code"] == exit_codes.HARDWARE:
        return _hardware(known[0], codes)
    if records:
        record = (known or records)[0]
        step = f" after step {record['step']}" if record["step"] is not None else " before the first step"
        return AttemptEnding(
            cause=CAUSE_OF_CODE.get(record["exit_code"], Cause.EXCEPTION),
            message=f"rank {record['rank']} on {record['host']}{step}: {record['error']}: "
            f"{_in_one_line(record['message'])}",
            rank=record["rank"],
            host=record["host"],
            exit_codes=codes,
        )
    if set(codes.values()) == {exit_codes.FINISHED}:
        return AttemptEnding(cause=Cause.FINISHED, message="all steps are done", exit_codes=codes)
    if set(codes.values()) == {exit_codes.SAVED_AND_LEFT} and asked is not None:
        return AttemptEnding(cause=asked, message="saved and left", exit_codes=codes)
    failed = next((rank for rank, code in sorted(first.items()) if code in CAUSE_OF_CODE and code), None)
    cause = Cause.EXCEPTION if failed is None else CAUSE_OF_CODE[first[failed]]
    message = f"ranks ended with {dict(codes)} and left no record"
    return AttemptEnding(cause=cause, message=message, rank=failed, exit_codes=codes)


def _hardware(record: Mapping[str, Any], codes: Mapping[int, int]) -> AttemptEnding:
    """Say which rank computed wrongly; every rank writes down the same, and which they blame."""
    ranks, hosts = record["blamed"]["ranks"], record["blamed"]["hosts"]
    return AttemptEnding(
        cause=Cause.HARDWARE,
        message=_in_one_line(record["message"]),
        rank=ranks[0] if hosts else None,
        host=hosts[0] if hosts else None,
        exit_codes=codes,
    )


def _waits(record: Mapping[str, Any]) -> bool:
    return bool(record["stands"]["waits_for_others"])


def _hang(hung: Sequence[Mapping[str, Any]], silent: Mapping[int, str]) -> AttemptEnding:
    """Say which rank hung: the first that waited for no other, or one that told nothing while all others waited.

    Args:
        silent: the ranks that told nothing, each with its node.
    """
    waiting = [record for record in hung if _waits(record)]
    culprit = next((record for record in hung if not _waits(record)), None)
    if culprit is None and silent:
        rank, node = next(iter(silent.items()))
        message = (
            f"rank {rank} on {node} told nothing while {_count(len(waiting), 'rank')} waited{_where(waiting[0])}: "
            "it is stopped, or stuck in native code or in the kernel; its log may hold its stacks"
        )
        if len(silent) > 1:
            message += f"; {_count(len(silent) - 1, 'other rank')} told nothing either"
        return AttemptEnding(cause=Cause.HANG, message=message, rank=rank, host=node)
    record = culprit or hung[0]
    message = f"rank {record['rank']} on {record['host']} stood{_where(record)}: {record['stands']['at']}"
    if culprit is None:
        message += "; every rank waits for others"
    elif waiting:
        message += f"; {_count(len(waiting), 'rank')} waited for it"
    return AttemptEnding(cause=Cause.HANG, message=message, rank=record["rank"], host=record["host"])


def _where(record: Mapping[str, Any]) -> str:
    stands, step = record["stands"], record["step"]
    phase = str(stands["phase"])
    after = "" if step is None else f" after step {step}" if phase == "step" else f" (step {step})"
    return f" for {stands['seconds']:.0f} s in {_PHASES.get(phase, phase)}{after}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _killed_for_memory(
    first: Mapping[int, int], srun: SrunFailure | None, host: str, by_node: Mapping[str, str]
) -> AttemptEnding | None:
    """Return the ending where a rank was killed and memory was the reason, as its node or srun says."""
    is_said = False
    if srun is None:
        rank = next((rank for rank, code in sorted(first.items()) if code == 128 + signal.SIGKILL), None)
        node, is_killed = host, rank is not None
    else:
        rank, node = srun.rank, srun.host
        is_killed = srun.what.startswith("Killed") or srun.what == f"Exited with exit code {128 + signal.SIGKILL}"
        is_said = re.search("out of memory|oom", srun.what, re.IGNORECASE) is not None
    if rank is None or not (is_said or (is_killed and node in by_node)):
        return None
    why = by_node.get(node, f"srun: {srun.what}" if srun is not None else "")
    message = f"rank {rank} on {node} was killed for memory: {why}"
    return AttemptEnding(cause=Cause.OUT_OF_MEMORY, message=message, rank=rank, host=node)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _in_one_line(text: str) -> str:
    """Return an error with its list of problems as one sentence."""
    first, *rest = (line.strip().removeprefix("- ") for line in text.splitlines() if line.strip())
    return " ".join([first, "; ".join(rest)]).strip()
