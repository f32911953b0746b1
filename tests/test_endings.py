"""What ended the ranks: a table of records, of srun's words, and of exit codes."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from orchestrator import exit_codes
from orchestrator.exit_codes import Cause
from orchestrator.slurm.endings import (
    AttemptEnding,
    SrunFailure,
    explain_ending,
    first_srun_failure,
    srun_words,
)

# As srun 22.05 printed it on a Slurm of 4 nodes.
KILLED = """srun: error: n003: task 2: Killed
srun: Terminating Job Step 7.1
slurmstepd-n001: error: *** STEP 7.1 ON n001 CANCELLED AT 2026-11-26T01:12:03 ***
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: n001: task 0: Terminated
srun: error: n002: task 1: Exited with exit code 1
srun: error: n004: task 3: Killed
"""
OWN_CODE_FIRST = """srun: error: n002: task 1: Exited with exit code 72
srun: Terminating Job Step 7.1
srun: error: n001: task 0: Killed
"""
NODE_LOST = """srun: error: Node failure on n002
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: n002: task 1: Killed
"""


def record(rank: int, code: int, time: float = 1.0, step: int | None = 5) -> dict[str, Any]:
    return {
        "rank": rank, "host": f"n{rank + 1:03d}", "time": time, "step": step, "exit_code": code,
        "error": "ValueError", "message": "first\n  - second\n  - third", "traceback": "",
    }  # fmt: skip


def hang(rank: int, time: float = 1.0, *, waits: bool, phase: str = "step", step: int | None = 5) -> dict[str, Any]:
    stands = {
        "phase": phase, "seconds": 12.3, "waits_for_others": waits, "at": "checkpoint_files.py:88 in write_part",
        "stacks": f"stacks/rank_{rank:04d}.txt", "flight_record": None,
    }  # fmt: skip
    return {**record(rank, exit_codes.HANG, time, step), "error": "Hang", "message": "stood", "stands": stands}


def explain(
    *records: dict[str, Any],
    codes: dict[int, int],
    asked: Cause | None = None,
    srun: str = "",
    first: dict[int, int] | None = None,
    is_killed_late: bool = False,
    ranks_on: Sequence[str] = (),
    killed_for_memory: Mapping[str, str] | None = None,
) -> AttemptEnding:
    return explain_ending(
        records, codes if first is None else first, codes, asked=asked, srun=first_srun_failure(srun),
        is_killed_late=is_killed_late, host="here", world_size=4, ranks_on=ranks_on,
        killed_for_memory=killed_for_memory or {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("log", "failure"),
    [
        pytest.param("", None, id="nothing"),
        pytest.param(KILLED, SrunFailure(host="n003", rank=2, what="Killed"), id="the first and not the largest"),
        pytest.param(OWN_CODE_FIRST, SrunFailure(host="n001", rank=0, what="Killed"), id="own codes have a record"),
        pytest.param("srun: error: n001: task 0: Killed\n" + NODE_LOST,
                     SrunFailure(host="n002", rank=None, what="Slurm has lost the node"), id="a node, told of late"),
        pytest.param(NODE_LOST, SrunFailure(host="n002", rank=None, what="Slurm has lost the node"), id="a node"),
        pytest.param("srun: error: n004: task 74: Exited with exit code 1\nsrun: error: n03: task 60: Exited with exit "
                     "code 143\nsrun: error: n002: task 1: Terminated\n", None, id="peers that srun ended"),
        pytest.param("srun: error: Task launch for StepId=7.1 failed on node n002: Invalid job credential\n",
                     SrunFailure(host="n002", rank=None, what="no rank could be started on it: Invalid job credential"),
                     id="a start"),
        pytest.param("srun: error: n01: tasks 8-15: Out Of Memory\n",
                     SrunFailure(host="n01", rank=8, what="Out Of Memory"), id="several tasks"),
    ],
)  # fmt: skip
def test_srun_tells_which_failed_first(log: str, failure: SrunFailure | None) -> None:
    assert first_srun_failure(log) == failure


def test_a_killed_rank_is_named_with_its_node_though_sruns_code_is_that_of_another() -> None:
    ending = explain(record(1, exit_codes.EXCEPTION, time=2.0), codes={0: 143}, srun=KILLED)
    assert (ending.cause, ending.rank, ending.host) == (Cause.RANK_KILLED, 2, "n003")
    assert ending.message == "rank 2 on n003 ended without a word: Killed"


def test_a_rank_that_knows_its_cause_is_believed_before_the_signal_of_those_that_waited_for_it() -> None:
    ending = explain(record(1, exit_codes.BAD_CHECKPOINT), codes={0: 137}, srun=OWN_CODE_FIRST)
    assert (ending.cause, ending.rank) == (Cause.BAD_CHECKPOINT, 1)
    assert ending.message == "rank 1 on n002 after step 5: ValueError: first second; third"


@pytest.mark.parametrize(
    ("codes", "known", "cause"),
    [
        ({0: 137}, exit_codes.DISK_FULL, Cause.DISK_FULL),  # srun's code, of ranks that were killed after it
        ({0: 74}, exit_codes.DISK_FULL, Cause.DISK_FULL),
        ({0: 137}, exit_codes.NOT_FINITE, Cause.NOT_FINITE),
        ({0: 137}, exit_codes.EXCEPTION, Cause.RANK_KILLED),  # a peer that lost its connection
        ({0: 1}, exit_codes.EXCEPTION, Cause.EXCEPTION),
    ],
)
def test_a_record_counts_more_than_the_largest_exit_code_unless_it_is_of_a_peer(
    codes: dict[int, int], known: int, cause: Cause
) -> None:
    assert explain(record(3, known), codes=codes).cause == cause


def test_the_code_when_the_first_failure_was_seen_counts() -> None:
    codes = {0: exit_codes.EXCEPTION, 1: exit_codes.DISK_FULL}
    ending = explain_ending([], {1: exit_codes.DISK_FULL}, codes, asked=None, host="here")
    assert (ending.cause, ending.rank) == (Cause.DISK_FULL, 1)
    assert "left no record" in ending.message


def test_the_earliest_exception_is_told_first() -> None:
    ending = explain(record(3, 1, time=1.0, step=None), record(0, 1, time=2.0), codes={0: 1, 3: 1})
    assert (ending.cause, ending.rank) == (Cause.EXCEPTION, 3)
    assert ending.message.startswith("rank 3 on n004 before the first step: ValueError")


def test_a_node_that_slurm_has_lost_is_a_failed_node_and_not_a_killed_rank() -> None:
    ending = explain(codes={0: 137}, srun=NODE_LOST)
    assert (ending.cause, ending.host, ending.rank) == (Cause.NODE_FAILED, "n002", None)


@pytest.mark.parametrize("asked", [Cause.TIME_LIMIT, Cause.PREEMPTED, Cause.CANCELLED])
def test_ranks_that_were_asked_to_stop_and_had_no_time_are_no_killed_ranks(asked: Cause) -> None:
    ending = explain(codes={0: 137}, asked=asked, srun=KILLED)
    assert (ending.cause, ending.rank) == (asked, None)
    assert "before it could save" in ending.message


@pytest.mark.parametrize(
    ("codes", "asked", "cause"),
    [
        ({0: 0, 1: 0}, None, Cause.FINISHED),
        ({0: 75, 1: 75}, Cause.PREEMPTED, Cause.PREEMPTED),
        ({0: 0, 1: 75}, Cause.TIME_LIMIT, Cause.EXCEPTION),
        ({0: 75}, None, Cause.EXCEPTION),
        ({0: 0, 1: 74}, None, Cause.DISK_FULL),
        ({0: 0, 1: 9}, None, Cause.EXCEPTION),
    ],
)
def test_without_records_the_codes_speak(codes: dict[int, int], asked: Cause | None, cause: Cause) -> None:
    assert explain(codes=codes, asked=asked).cause == cause


@pytest.mark.parametrize(
    ("log", "code", "words"),
    [
        ("srun: unrecognized option '--container-image=x'\nTry \"srun --help\" for more information\n", 255,
         "unrecognized option '--container-image=x'"),
        ("srun: error: Unable to create step for job 7: Unable to contact slurm controller (connect failure)\n", 1,
         "Unable to create step for job 7: Unable to contact slurm controller (connect failure)"),
    ],
)  # fmt: skip
def test_a_start_that_srun_refuses_is_told_in_its_words(log: str, code: int, words: str) -> None:
    ending = explain_ending([], {0: code}, {0: code}, asked=None, words=srun_words(log), host="here")
    assert (ending.cause, ending.message) == (Cause.START_FAILED, f"srun: {words}")


def test_a_code_that_is_no_signal_is_told_too() -> None:
    assert "signal 127" in explain(codes={0: 255}).message


def test_an_exception_is_not_hidden_by_the_kill_of_those_that_waited_for_it() -> None:
    ending = explain(record(1, exit_codes.EXCEPTION), first={}, codes={0: 143})
    assert (ending.cause, ending.rank) == (Cause.EXCEPTION, 1)


def test_a_killed_rank_is_named_though_srun_was_ended_by_us() -> None:
    ending = explain(record(0, exit_codes.EXCEPTION), first={}, codes={0: 143}, srun=KILLED)
    assert (ending.cause, ending.rank, ending.host) == (Cause.RANK_KILLED, 2, "n003")


def test_ranks_that_were_killed_for_being_late_were_asked_to_stop() -> None:
    ending = explain(first={}, codes={0: 143}, asked=Cause.PREEMPTED, is_killed_late=True)
    assert ending.cause == Cause.PREEMPTED
    assert "before it could save" in ending.message


def test_a_local_rank_is_named_by_its_signal() -> None:
    ending = explain(codes={0: 1, 1: 137})
    assert (ending.cause, ending.rank, ending.host) == (Cause.RANK_KILLED, 1, "here")
    assert "SIGKILL" in ending.message


NODES = ("n001", "n002")


@pytest.mark.parametrize(
    ("records", "rank", "host", "message"),
    [
        pytest.param(
            [hang(0, waits=True), hang(2, waits=True), hang(1, waits=False, phase="save", step=8), hang(3, waits=True)],
            1, "n002",
            "rank 1 on n002 stood for 12 s in a save (step 8): checkpoint_files.py:88 in write_part; "
            "3 ranks waited for it",
            id="the one that waits for nobody",
        ),
        pytest.param(
            [hang(1, waits=False, phase="start", step=None)], 1, "n002",
            "rank 1 on n002 stood for 12 s in its start: checkpoint_files.py:88 in write_part",
            id="nobody waited",
        ),
        pytest.param(
            [hang(0, waits=True), hang(1, waits=True), hang(3, waits=True)], 2, "n002",
            "rank 2 on n002 told nothing while 3 ranks waited for 12 s in a step after step 5: it is stopped, or stuck "
            "in native code or in the kernel; its log may hold its stacks",
            id="the one that tells nothing",
        ),
        pytest.param(
            [hang(3, waits=True), record(2, exit_codes.EXCEPTION)], 0, "n001",
            "rank 0 on n001 told nothing while 1 rank waited for 12 s in a step after step 5: it is stopped, or stuck "
            "in native code or in the kernel; its log may hold its stacks; 1 other rank told nothing either",
            id="several that tell nothing",
        ),
        pytest.param(
            [hang(2, waits=True), *(hang(rank, 2.0, waits=True) for rank in (0, 1, 3))], 2, "n003",
            "rank 2 on n003 stood for 12 s in a step after step 5: checkpoint_files.py:88 in write_part; "
            "every rank waits for others",
            id="all wait",
        ),
        pytest.param(
            [record(0, exit_codes.EXCEPTION, 0.5), hang(1, waits=False), record(2, exit_codes.EXCEPTION, 2.0)],
            1, "n002",
            "rank 1 on n002 stood for 12 s in a step after step 5: checkpoint_files.py:88 in write_part",
            id="lost connections of others",
        ),
    ],
)  # fmt: skip
def test_a_hang_is_the_one_ranks_for_which_others_waited(
    records: list[dict[str, Any]], rank: int, host: str, message: str
) -> None:
    ending = explain(*records, codes={0: 143}, ranks_on=NODES)
    assert (ending.cause, ending.rank, ending.host, ending.message) == (Cause.HANG, rank, host, message)


def test_a_local_rank_that_ended_well_is_not_one_that_tells_nothing() -> None:
    codes = {0: exit_codes.HANG, 1: exit_codes.FINISHED, 2: 137, 3: exit_codes.HANG}
    ending = explain(hang(0, waits=True), hang(3, waits=True), codes=codes, first={0: exit_codes.HANG})
    assert (ending.cause, ending.rank, ending.host) == (Cause.HANG, 2, "here")


@pytest.mark.parametrize(
    ("others", "codes", "srun", "cause"),
    [
        ([record(2, exit_codes.BAD_DATA, 2.0)], {0: 143}, "", Cause.BAD_DATA),  # a rank that knows more
        ([], {0: 137}, NODE_LOST, Cause.NODE_FAILED),
        ([], {0: 137}, KILLED, Cause.RANK_KILLED),
    ],
)
def test_ranks_that_waited_for_what_is_known_are_no_hang(
    others: list[dict[str, Any]], codes: dict[int, int], srun: str, cause: Cause
) -> None:
    assert explain(hang(0, waits=True), *others, codes=codes, srun=srun, ranks_on=NODES).cause == cause


def test_an_old_start_whose_rank_left_is_superseded() -> None:
    ending = explain(record(0, exit_codes.SUPERSEDED), record(1, exit_codes.EXCEPTION, 2.0), codes={0: 78, 1: 1})
    assert (ending.cause, ending.rank) == (Cause.SUPERSEDED, 0)


# In the manner of Slurm's sources, 21.08 to 24.05, where cgroups limit a job's memory; not seen here.
OUT_OF_MEMORY = """slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.1. Some tasks have been OOM Killed.
srun: error: n003: task 2: Out Of Memory
srun: Terminating StepId=7.1
"""
KILLED_FOR_MEMORY = """slurmstepd-n003: error: Detected 1 oom_kill event in StepId=7.1. Some tasks have been OOM Killed.
srun: error: n003: task 2: Killed
"""
WORDS = "1 process was killed for memory there (oom_kill of /proc/vmstat rose from 0 to 1)"


@pytest.mark.parametrize(
    ("srun", "by_node", "cause", "message"),
    [
        (KILLED, {"n003": WORDS}, Cause.OUT_OF_MEMORY, f"rank 2 on n003 was killed for memory: {WORDS}"),
        (KILLED, {"n002": WORDS}, Cause.RANK_KILLED, "rank 2 on n003 ended without a word: Killed"),
        (OUT_OF_MEMORY, {}, Cause.OUT_OF_MEMORY, "rank 2 on n003 was killed for memory: srun: Out Of Memory"),
        (OUT_OF_MEMORY, {"n003": WORDS}, Cause.OUT_OF_MEMORY, f"rank 2 on n003 was killed for memory: {WORDS}"),
        (
            KILLED_FOR_MEMORY, {}, Cause.OUT_OF_MEMORY,
            "rank 2 on n003 was killed for memory: srun: Killed: Detected 1 oom_kill event in StepId=7.1. Some "
            "tasks have been OOM Killed.",
        ),
        (NODE_LOST, {"n002": WORDS}, Cause.NODE_FAILED, "node n002: Slurm has lost the node"),
    ],
)  # fmt: skip
def test_a_rank_that_was_killed_for_memory_is_told_from_one_that_was_killed(
    srun: str, by_node: dict[str, str], cause: Cause, message: str
) -> None:
    peer = record(1, exit_codes.EXCEPTION)
    ending = explain(peer, codes={0: 137}, srun=srun, ranks_on=NODES, killed_for_memory=by_node)
    assert (ending.cause, ending.message) == (cause, message)


def test_a_local_rank_that_was_killed_for_memory_is_said_to_be() -> None:
    ending = explain(codes={0: 1, 1: 137}, killed_for_memory={"here": WORDS})
    assert (ending.cause, ending.rank, ending.host) == (Cause.OUT_OF_MEMORY, 1, "here")
    assert explain(codes={0: 1, 1: 134}, killed_for_memory={"here": WORDS}).cause == Cause.RANK_KILLED


def test_a_rank_that_tells_of_its_memory_itself_is_believed() -> None:
    assert explain(record(1, exit_codes.OUT_OF_MEMORY), codes={0: 137}).cause == Cause.OUT_OF_MEMORY
