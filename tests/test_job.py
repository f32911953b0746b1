"""What Slurm says of the supervisor's own job, and what that means."""

import dataclasses

import pytest

from orchestrator.exit_codes import Cause
from orchestrator.slurm.job import JobFacts, OwnJob, by_switch, facts_in, why_terminated

# As `scontrol show job --oneliner` of Slurm 22.05 printed it just after `scontrol requeue`.
REQUEUED = (
    "JobId=2 JobName=a job=b UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901758 Nice=0 Account=(null) "
    "QOS=(null) JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:00:01 TimeLimit=365-00:00:00 TimeMin=N/A SuspendTime=None NodeList=n[001-002] Power="
)
JOB = OwnJob(job_id="2", restarts=0, nodes=("n001", "n002"), node_list="n[001-002]")


def facts(
    state: str = "COMPLETING", restarts: int = 0, *, is_preempted: bool = False, is_over_time: bool = False
) -> JobFacts:
    return JobFacts(
        state=state, restarts=restarts, may_requeue=True, is_preempted=is_preempted, is_over_time=is_over_time
    )


def test_scontrols_words_are_read() -> None:
    assert facts_in(REQUEUED) == facts(restarts=1)
    assert facts_in(REQUEUED.replace("SuspendTime", "PreemptTime=2026-11-26T01:00:00 SuspendTime")) == facts(
        restarts=1, is_preempted=True
    )
    assert facts_in(REQUEUED.replace("Reason=None", "Reason=TimeLimit")) == facts(restarts=1, is_over_time=True)
    listed = REQUEUED.replace("Power=", "Partition=gpu ExcNodeList=n003,n[005-006] Power=")
    assert facts_in(listed) == dataclasses.replace(facts(restarts=1), partition="gpu", excluded="n003,n[005-006]")
    assert facts_in(REQUEUED.replace("Power=", "ExcNodeList=(null) Power=")) == facts(restarts=1)
    assert facts_in("slurm_load_jobs error: Invalid job id specified") is None
    assert facts_in("") is None


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        pytest.param(facts(restarts=1), Cause.PREEMPTED, id="requeued"),
        pytest.param(facts(), Cause.CANCELLED, id="cancelled"),
        pytest.param(facts("CANCELLED"), Cause.CANCELLED, id="cancelled and over"),
        pytest.param(facts("RUNNING", is_preempted=True), Cause.PREEMPTED, id="in the grace of a preemption"),
        pytest.param(facts("CANCELLED", is_preempted=True), Cause.CANCELLED, id="cancelled in that grace"),
        pytest.param(facts("PREEMPTED"), Cause.PREEMPTED, id="preempted"),
        pytest.param(facts(is_over_time=True), Cause.TIME_LIMIT, id="over time, the ranks were slow"),
        pytest.param(None, Cause.CANCELLED, id="slurmctld does not answer"),
    ],
)
def test_a_term_is_a_cancellation_unless_slurm_says_otherwise(said: JobFacts | None, cause: Cause) -> None:
    assert why_terminated(JOB, said) == cause


def test_ranks_are_side_by_side_on_a_switch() -> None:
    leaf = {"n1": "a", "n2": "b", "n3": "a", "n4": "b", "n5": "a"}
    assert by_switch(("n1", "n2", "n3", "n4", "n5"), leaf) == ("n1", "n3", "n5", "n2", "n4")
    assert by_switch(("n2", "n3", "n4"), leaf) == ("n2", "n4", "n3")
    assert by_switch(("n3", "n1"), {}) == ("n3", "n1")
