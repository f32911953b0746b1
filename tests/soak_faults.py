"""The faults of a soak: what each does to a run for real, when it may strike, and what may be recorded of it."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestrator.checkpoints import MARKER, checkpoint_name, complete_checkpoints, parse_name, part_record
from orchestrator.exit_codes import Cause
from orchestrator.files import read_json
from orchestrator.reconcile import ENDED
from orchestrator.recovery import Action
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm import sandbox, sandbox_daemons
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.slurm.sandbox_files import search_path
from orchestrator.status import read_status
from tests.launched import processes_of
from tests.slurm_faults import little_memory_group
from tests.slurm_runs import job_of

EARLY, STEP, SAVE = "early", "step", "save"
"""Some seconds after an attempt has begun, after a new checkpoint, while the next one is written."""
ANY = (EARLY, STEP, SAVE)
SECONDS_TO_SEE = 60.0


class SoakError(Exception):
    """The chain cannot go on; the message says where it stood."""


@dataclasses.dataclass
class Scene:
    """A run on a Slurm of our own, and what was done to both."""

    name: str
    run: RunDirectory
    interval_steps: int
    random: random.Random
    dead_nodes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Command of each node that is to be started again."""
    damaged: dict[str, int] = dataclasses.field(default_factory=dict)
    """Checkpoints that were damaged, each with the attempt that was there then."""
    groups: list[Path] = dataclasses.field(default_factory=list)
    """Memory cgroups that were made."""

    @property
    def slurm(self) -> Sandbox:
        """The sandbox with the daemons that it has now."""
        return sandbox.found(self.name)

    @property
    def attempt(self) -> AttemptDirectory:
        """The newest attempt."""
        return self.run.attempts()[-1]

    def supervisor(self) -> psutil.Process:
        """Return the newest attempt's supervisor; one that was given up may still live."""
        created = float((self.attempt.read_job() or {})["process_created"])
        for process in processes_of(self.run):
            with contextlib.suppress(psutil.Error):
                is_it = "orchestrator.slurm.supervisor" in process.cmdline()
                if is_it and abs(process.create_time() - created) < 0.05:
                    return process
        raise SoakError(f"attempt {self.attempt.number} has no living supervisor")

    def ranks(self) -> list[psutil.Process]:
        """Return the newest attempt's living ranks, the children of the process that forks them."""
        with contextlib.suppress(psutil.Error, SoakError):
            for child in self.supervisor().children():
                if "megatron_solar.preload" in child.cmdline():
                    return [rank for rank in child.children() if rank.status() != psutil.STATUS_ZOMBIE]
        return []

    def are_ranks_up(self) -> bool:
        """Whether the newest attempt's ranks have found each other."""
        return self.attempt.rendezvous.exists() and len(self.ranks()) > 1

    def nodes(self) -> list[str]:
        """Return the nodes with ranks in their order."""
        path = self.attempt.checks / "choice.json"
        return list(read_json(path)["nodes"]) if path.exists() else []

    def others(self) -> list[str]:
        """Return the nodes with ranks on which the supervisor does not run."""
        return [node for node in self.nodes() if node != (self.attempt.read_job() or {})["node"]]

    def kill_node(self, node: str) -> str:
        """Have a node die, to be started again by `repair`."""
        process = sandbox_daemons.living_daemon(self.slurm, node)
        assert process is not None
        self.dead_nodes[node] = process.cmdline()
        sandbox.kill_node(self.slurm, node)
        return node

    def repair(self) -> None:
        """Start dead nodes again, and what lived on with a slurmd that had died dies now."""
        for node, command in self.dead_nodes.items():
            with contextlib.suppress(Exception):  # it was slurmd alone
                sandbox.kill_node(self.slurm, node)
            sandbox_daemons._start(self.slurm, node, command)
        self.dead_nodes.clear()

    def remove_groups(self) -> None:
        """Remove the memory cgroups, once nothing is in them."""
        for group in self.groups:
            deadline = time.monotonic() + SECONDS_TO_SEE
            while (group / "cgroup.procs").read_text().split() and time.monotonic() < deadline:
                time.sleep(0.1)
            group.rmdir()
        self.groups.clear()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that happens to a run."""

    name: str
    cause: Callable[[Scene], str]
    """Makes it happen, and says to what."""
    recorded_as: tuple[Cause, ...]
    """Causes that it may lead to; none where the attempt must go on."""
    actions: tuple[Action, ...] = ()
    moments: tuple[str, ...] = ANY
    strikes_ranks: bool = False
    """Whether ranks must be there."""
    needs_person: bool = False
    """Whether the run ends by it, and a person resumes it."""
    whole_checkpoints: int = 1
    """How many that nobody has damaged must be there."""


def _warn(scene: Scene) -> str:
    scene.slurm.ask("scancel", "--batch", "--signal=USR2", job_of(scene.run))
    return ""


def _preempt(scene: Scene) -> str:
    """Submit an urgent job for a node that the run has."""
    node = str(scene.slurm.ask("squeue", "--noheader", f"--jobs={job_of(scene.run)}", "--format=%B").strip())
    partition = scene.slurm.ask("squeue", "--noheader", f"--jobs={job_of(scene.run)}", "--format=%P").strip()
    scene.slurm.ask(
        "sbatch", f"--partition={sandbox.URGENT}", f"--nodelist={node}", "--nodes=1", "--exclusive",
        "--output=/dev/null", "--wrap", "sleep 1",
    )  # fmt: skip
    return "with grace" if partition == "graceful" else "without grace"


def _requeue(scene: Scene) -> str:
    scene.slurm.ask("scontrol", "requeue", job_of(scene.run))
    return ""


def _cancel(scene: Scene) -> str:
    scene.slurm.ask("scancel", job_of(scene.run))
    return ""


def _kill_supervisor(scene: Scene) -> str:
    scene.supervisor().kill()
    return ""


def _kill_rank(scene: Scene) -> str:
    return _signal_rank(scene, signal.SIGKILL)


def _stop_rank(scene: Scene) -> str:
    return _signal_rank(scene, signal.SIGSTOP)


def _signal_rank(scene: Scene, number: signal.Signals) -> str:
    scene.random.choice(scene.ranks()).send_signal(number)
    return number.name


def _hang_in_save(scene: Scene) -> str:
    """Put a FIFO where one rank will open the file of its part of a checkpoint to come."""
    rank = scene.random.randrange(2)
    ranks, attempt = scene.ranks(), scene.attempt.number
    places = [parse_name(path.name) for path in scene.run.checkpoints_folder.iterdir()]
    step = (
        max(place[0] for place in places if place is not None) + 2 * scene.interval_steps
    )  # the next may begin meanwhile
    folder = scene.run.checkpoint_path(checkpoint_name(step, attempt))
    folder.mkdir()
    host = (scene.attempt.read_job() or {})["host"]
    for process in ranks:  # each has the name that it has in its own space
        status = Path(f"/proc/{process.pid}/status").read_text()
        number = next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:"))
        os.mkfifo(folder / f".{part_record(rank)}.{host}.{number}.tmp")
    return f"rank {rank}, step {step}"


def _kill_node(scene: Scene) -> str:
    """Kill a node with a rank that is not the supervisor's."""
    return scene.kill_node(scene.random.choice(scene.others()))


def _kill_first_node(scene: Scene) -> str:
    return scene.kill_node(str((scene.attempt.read_job() or {})["node"]))


def _kill_slurmd(scene: Scene) -> str:
    """Kill the slurmd of a node with a rank, which lives on; its node is started anew in `repair`."""
    node = scene.random.choice(scene.others())
    process = sandbox_daemons.living_daemon(scene.slurm, node)
    assert process is not None
    scene.dead_nodes[node] = process.cmdline()
    sandbox.kill_slurmd(scene.slurm, node)
    return node


def _stop_controller(scene: Scene) -> str:
    """Have slurmctld be away for some seconds, and look whether a person is told nonsense meanwhile."""
    sandbox.stop_controller(scene.slurm)
    try:
        time.sleep(scene.random.uniform(1, 6))  # how long it is away at least
        state = read_status(scene.run).state
    finally:
        sandbox.start_controller(scene.slurm)
    if state in ENDED:
        raise SoakError(f"without slurmctld the status says {state}")
    return f"said {state}"


def _damage(scene: Scene) -> str:
    """Damage the newest checkpoint on the disk, and kill a rank so that somebody reads it."""
    checkpoint = complete_checkpoints(scene.run)[-1]
    name = scene.random.choice([*sorted(checkpoint.files), MARKER])
    path = checkpoint.path / name
    content = bytearray(path.read_bytes())
    if scene.random.random() < 0.5:
        at = scene.random.randrange(len(content))
        content[at] ^= 0xFF
        path.write_bytes(content)
        how = f"a byte of {name}"
    else:
        path.write_bytes(content[: len(content) // 2])
        how = f"half of {name}"
    scene.damaged[checkpoint.name] = scene.attempt.number
    _kill_rank(scene)
    return f"{how}, step {checkpoint.step}"


def _squeeze(scene: Scene) -> str:
    """Leave a rank a megabyte more than it has, so that the kernel kills it for memory."""
    group = little_memory_group(f"orchestrate-soak-{os.getpid()}-{len(scene.groups)}")
    scene.groups.append(group)
    (group / "cgroup.procs").write_text(str(scene.random.choice(scene.ranks()).pid))
    return ""


RESTARTED, REQUEUED, STOPPED = (Action.RESTART,), (Action.REQUEUE,), (Action.STOP,)
MOVED = RESTARTED + REQUEUED
"""On a spare node, or in the next job where there is none."""

FAULTS = (
    Fault(name="time limit's warning", cause=_warn, recorded_as=(Cause.TIME_LIMIT,), actions=REQUEUED),
    Fault(name="preemption", cause=_preempt, recorded_as=(Cause.PREEMPTED,), actions=REQUEUED),
    Fault(name="scontrol requeue", cause=_requeue, recorded_as=(Cause.PREEMPTED,), actions=REQUEUED),
    Fault(name="plain scancel", cause=_cancel, recorded_as=(Cause.CANCELLED,), actions=STOPPED, needs_person=True),
    Fault(name="supervisor killed", cause=_kill_supervisor, recorded_as=(Cause.SUPERVISOR_LOST,), actions=STOPPED,
          needs_person=True),
    Fault(name="rank killed", cause=_kill_rank, recorded_as=(Cause.RANK_KILLED,), actions=RESTARTED,
          strikes_ranks=True),
    Fault(name="rank stopped", cause=_stop_rank, recorded_as=(Cause.HANG,), actions=RESTARTED, moments=(STEP, SAVE),
          strikes_ranks=True),
    Fault(name="rank hangs in a save", cause=_hang_in_save, recorded_as=(Cause.HANG,), actions=RESTARTED,
          moments=(STEP,), strikes_ranks=True),
    Fault(name="node killed", cause=_kill_node, recorded_as=(Cause.NODE_FAILED,), actions=MOVED, strikes_ranks=True),
    Fault(name="first node killed", cause=_kill_first_node, recorded_as=(Cause.NODE_FAILED,), actions=REQUEUED),
    Fault(name="slurmd killed", cause=_kill_slurmd, recorded_as=(Cause.NODE_FAILED,), actions=MOVED,
          strikes_ranks=True),
    Fault(name="slurmctld away", cause=_stop_controller, recorded_as=(), moments=(STEP,), strikes_ranks=True),
    Fault(name="newest checkpoint damaged", cause=_damage, recorded_as=(Cause.RANK_KILLED,), actions=RESTARTED,
          moments=(STEP,), strikes_ranks=True, whole_checkpoints=3),
    Fault(name="out of memory", cause=_squeeze, recorded_as=(Cause.OUT_OF_MEMORY,), actions=RESTARTED,
          moments=(STEP, SAVE), strikes_ranks=True),
)  # fmt: skip
"""At a start a rank that needs more memory stops the run, and one that hangs is seen late: the tests have both."""


def draw(choice: random.Random, count: int) -> list[tuple[Fault, str]]:
    """Return a chain of faults, each with its moment: no kind again before all were, no two early ones in a row.

    Two attempts in a row that save nothing stop a run, as they should. Early is in an attempt that a fault made begin.
    """
    chain: list[tuple[Fault, str]] = []
    deck: list[Fault] = []
    while len(chain) < count:
        deck = deck or choice.sample(FAULTS, len(FAULTS))
        fault = deck.pop()
        may_be_early = not chain or (chain[-1][1] != EARLY and bool(chain[-1][0].recorded_as))
        chain.append((fault, choice.choice([m for m in fault.moments if m != EARLY or may_be_early])))
    return chain


def missing() -> list[str]:
    """Return what this machine lacks for the faults."""
    programs = [name for name in ("slurmctld", "munged", "unshare") if shutil.which(name, path=search_path()) is None]
    return [*programs, *(["root, for nodes that really die"] if os.geteuid() else [])]
