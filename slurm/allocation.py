"""The nodes of a Slurm job: checked before ranks start on them, the best of them chosen, heard from afterwards.

The first attempt checks every node, spares included. A restart in the same allocation checks only those
that gave reason to. A node that died or failed its checks is not taken again in this job.
"""

import dataclasses
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import RunError
from orchestrator.files import read_json, write_json
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.deputy import deputy_command
from orchestrator.slurm.endings import srun_words
from orchestrator.slurm.job import OwnJob, by_switch, switches
from orchestrator.slurm.memory import killed_since
from orchestrator.slurm.node_checks import Choice, Finding, RankRecord, choose_nodes, judge, judge_ranks
from orchestrator.slurm.node_watch import NodeWatch
from orchestrator.slurm.ranks import Preload, Ranks, rank_words, start_srun, start_step
from orchestrator.slurm.submission import code_environment
from orchestrator.values import from_plain, to_plain

CHECKS_MODULE = "megatron_solar.node_checks"
LOOK_SECONDS = 0.1
LEAVE_SECONDS = 3.0
"""For the agents to leave; their srun waits much longer for a node that is dead."""
START_SECONDS = 300.0
"""For the ranks of the checks to be imported, or their container unpacked, on the slowest node."""
GRACE_SECONDS = 15.0
"""For them to end when they are told to."""
TAIL_CHARACTERS = 600
REFUSED = "Unable to create step"
"""How srun says that Slurm would not have it, as for nodes that it has taken out of the job meanwhile."""
BEAT_SECONDS = 1.5
"""Within which an agent that lives has told again what it knows."""

log = logging.getLogger("supervisor")


class Allocation:
    """What the supervisor knows of its job's nodes; `close` ends the agents."""

    def __init__(self, run: RunDirectory, plan: TrainingPlan, job: OwnJob, avoided: Collection[str] = ()) -> None:
        """Know the nodes of a job.

        Args:
            avoided: nodes that were bad in an earlier job and should not be in this one; used if there is no other.
        """
        self._run = run
        self._plan = plan
        self._order = by_switch(job.nodes, switches())
        again = [node for node in self._order if node in avoided]
        is_enough = len(self._order) - len(again) >= plan.settings.cluster.nodes
        self._bad: dict[str, str] = dict.fromkeys(again, "it was bad in an earlier job") if is_enough else {}
        self._oom_kills: dict[str, int] = {}
        self._suspects: set[str] = set(job.nodes)
        self._watch: NodeWatch | None = None
        self._agents: subprocess.Popen[bytes] | None = None
        self.chosen: tuple[str, ...] = ()
        """On which ranks run, in their order."""
        self.checking: tuple[float, float] | None = None
        """When the newest choice began and ended, Unix time."""

    def choose(
        self, attempt: AttemptDirectory, preload: Callable[[], Preload | None], is_stopped: Callable[[], bool]
    ) -> Choice:
        """Check the suspects, and return the nodes to start on; what was found is kept in the attempt's folder.

        Args:
            preload: returns the process that forks CPU ranks, where there is one.
            is_stopped: whether nobody wants the answer any more.
        """
        cluster = self._plan.settings.cluster
        attempt.checks.mkdir()
        began = time.time()
        findings: list[Finding] = []
        suspects = [node for node in self._order if node in self._suspects and node not in self._bad]
        if self._watch is None:
            self._watch = NodeWatch(self._order, cluster, attempt.checks / "nodes", deputy_command(self._run))
            self._agents = self._start_agents(self._watch, attempt.checks / "agents.log")
        elif suspects:
            self._watch.recheck(suspects)
        if cluster.checks.enabled and suspects:
            reports = self._watch.wait_for_reports(suspects, cluster.checks.seconds, is_stopped)
            findings = judge(suspects, reports, cluster)
            usable = [node for node in suspects if node not in {f.node for f in findings if f.excludes}]
            if usable and not is_stopped():
                findings += self._findings_of_ranks(attempt, usable, preload, is_stopped)
        failed = {finding.node for finding in findings if finding.excludes}
        if len(suspects) > 1 and set(suspects) <= failed and not is_stopped():
            raise RunError(
                f"none of {len(suspects)} nodes passed its checks, so that it is hardly the nodes' fault: "
                f"{findings[-1]}{_said(attempt)}"
            )
        if not is_stopped():
            self._bad |= {f.node: f"{f.check}: {f.message}" for f in findings if f.excludes}
            self._suspects = set()
        self._bad |= self._watch.silent()
        usable = [node for node in self._order if node not in self._bad]
        choice = choose_nodes(usable, [f for f in findings if f.node in usable], cluster.nodes)
        choice = dataclasses.replace(choice, dropped={n: self._bad[n] for n in self._order if n in self._bad})
        self.chosen = choice.nodes
        self.checking = (began, time.time())
        write_json(
            attempt.checks / "choice.json",
            {"checking": self.checking, **to_plain(choice), "findings": to_plain(findings)},
        )
        for finding in findings:
            log.warning("%s", finding)
        log.info("takes %d of %d nodes, %d spare", len(choice.nodes), len(self._order), len(choice.spares))
        return choice

    def first_dead(self) -> tuple[str, str] | None:
        """Return the first node with ranks from which nothing is heard any more, with why."""
        silent = self._watch.silent() if self._watch is not None else {}
        self._bad |= silent
        node = next((node for node in self.chosen if node in silent), None)
        return None if node is None else (node, silent[node])

    @property
    def bad(self) -> dict[str, str]:
        """The nodes on which no rank is started any more in this job, with why."""
        return dict(self._bad)

    def count_oom_kills(self) -> None:
        """Note how many processes each node has killed for memory so far."""
        self._oom_kills = self._watch.oom_kills() if self._watch is not None else {}

    def killed_for_memory(self) -> dict[str, str]:
        """Return the nodes that have killed for memory since that was noted, in words; waits for their next beat."""
        time.sleep(BEAT_SECONDS)
        return killed_since(self._oom_kills, self._watch.oom_kills() if self._watch is not None else {})

    def drop(self, node: str, why: str) -> None:
        """Start no rank on a node any more in this job."""
        if node in self._order:
            self._bad[node] = why

    def suspect(self, node: str) -> None:
        """Have a node checked again before ranks start on it."""
        if node in self._order:
            self._suspects.add(node)

    def has_enough(self) -> bool:
        """Whether as many nodes as the run needs are not known to be bad."""
        return len(self._order) - len(self._bad) >= self._plan.settings.cluster.nodes

    def close(self) -> None:
        """End the agents."""
        if self._watch is not None:
            self._watch.close()
        if self._agents is not None:
            try:
                self._agents.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                self._agents.kill()
                self._agents.wait()

    def _start_agents(self, watch: NodeWatch, log_path: Path) -> "subprocess.Popen[bytes]":
        """Start an agent on every node; the step outlives the death of any of them."""
        count = len(self._order)
        arguments = [
            f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--overlap", "--no-kill",
            "--kill-on-bad-exit=0", "--wait=0", "--export=ALL", f"--output={log_path}", "--open-mode=append",
            *watch.agent_command(sys.executable),
        ]  # fmt: skip
        return start_srun(self._run, arguments, {**code_environment(self._run), **watch.agent_environment()}, log_path)

    def _findings_of_ranks(
        self,
        attempt: AttemptDirectory,
        nodes: Sequence[str],
        preload: Callable[[], Preload | None],
        is_stopped: Callable[[], bool],
    ) -> list[Finding]:
        """Have ranks compute and speak to each other on these nodes, and judge what they saw.

        A single suspect gets a sound partner, which is judged with it and not blamed for it.
        """
        cluster = self._plan.settings.cluster
        partners = [node for node in self._order if node not in self._bad and node not in nodes]
        tested = [*nodes, *(partners[:1] if len(nodes) == 1 else [])]
        folder = attempt.checks / "ranks"
        folder.mkdir()
        words = rank_words(
            self._run, self._plan, preload(), CHECKS_MODULE,
            [
                str(folder), "--nodes", str(len(tested)), "--ranks-per-node", str(cluster.ranks_per_node),
                "--device", cluster.device, "--seconds", str(cluster.checks.seconds),
            ],
        )  # fmt: skip
        step = start_step(
            self._run, self._plan, words, name=f"checks-{attempt.number}", nodes=tested,
            ranks_per_node=cluster.ranks_per_node, output=f"{folder}/rank_%4t.log", log=folder / "srun.log",
            outlives_nodes=True,
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS + 2 * cluster.checks.seconds  # they wait for each other, then check
        while step.poll() is None and time.monotonic() < deadline and not is_stopped():
            time.sleep(LOOK_SECONDS)
        Ranks({0: step}, folder / "srun.log").kill(GRACE_SECONDS)
        if is_stopped():
            return []
        records = [_rank_record(read_json(path)) for path in sorted(folder.glob("rank_*.json"))]
        refusal = srun_words((folder / "srun.log").read_text(errors="replace"))
        if not records and REFUSED in refusal:
            log.warning("the ranks of the checks were not started, which is no node's fault: %s", refusal)
            return []
        found = judge_ranks(tested, records, cluster)
        return [finding for finding in found if finding.node in nodes]


def _said(attempt: AttemptDirectory) -> str:
    """Return the end of what the checks' srun and the first rank printed."""
    logs = [
        attempt.checks / "agents.log",
        attempt.checks / "ranks" / "srun.log",
        attempt.checks / "ranks/rank_0000.log",
    ]
    texts = {path: path.read_text(errors="replace").strip()[-TAIL_CHARACTERS:] for path in logs if path.exists()}
    return "".join(f"; {path.name} ends: {text}" for path, text in texts.items() if text)


def _rank_record(plain: dict[str, Any]) -> RankRecord:
    problems: list[str] = []
    record = from_plain(RankRecord, plain, "", problems)
    if record is None:
        raise ValueError(f"a rank of the node checks wrote what nobody can read: {problems}")
    return record


def describe(choice: Choice) -> str:
    """Say in one line which nodes were dropped and whether enough are left."""
    dropped = "; ".join(f"{node}: {why}" for node, why in choice.dropped.items())
    if choice.missing:
        return f"{choice.missing} nodes too few passed their checks: {dropped}"
    return f"{len(choice.dropped)} nodes dropped: {dropped}" if dropped else "all nodes passed their checks"
