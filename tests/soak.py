"""A run that meets a random chain of faults, and has to end as if it had met none. By hand: `make soak`.

    python -m tests.soak [--seed N] [--faults 10]

A Slurm of six nodes of our own, one launched run with real ranks on two of them and a spare, and faults caused for
real (`soak_faults.py`), the next one when the run goes on. Then the run finishes, and is compared bit for bit with one
that was left alone (`soak_verdict.py`). The seed draws layout, partitions, faults and moments; when exactly each
strikes is also the machine's. Needs root, slurm-wlm and munge.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from orchestrator.checkpoints import MARKER, complete_checkpoints
from orchestrator.demo import find_vocabulary
from orchestrator.errors import OrchestrateError
from orchestrator.events import StepEvent, read_events
from orchestrator.launch import cancel
from orchestrator.plan import read_plan
from orchestrator.reconcile import ENDED
from orchestrator.recovery import Action
from orchestrator.resume import prepare_resume, resume
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm import sandbox
from orchestrator.status import read_status
from orchestrator.tokenize.stage import tokenize_corpus
from tests.launched import processes_of
from tests.slurm_runs import launch_on, surviving_losses
from tests.soak_faults import EARLY, SAVE, STEP, Fault, Scene, SoakError, draw, missing
from tests.soak_verdict import problems_of

NODES = 6
INTERVAL_STEPS = 6
STEPS_PER_FAULT = 40
BATCH = 8
LAYOUTS = ("layout.tensor_parallel=1", "layout.tensor_parallel=2", "layout.pipeline_parallel=2")
PARTITIONS = ("gpu", "graceful")
DEADLINE_SECONDS = 300.0
EARLY_SECONDS = 10.0
"""Within which a fault strikes after an attempt has begun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One fault of the chain."""

    fault: str
    moment: str
    attempt: int
    recorded: str
    seconds: float | None
    """From the fault to the next step that nobody had done before; None where another fault came before that."""


def main() -> int:
    """Soak a run, print how it went, and return 1 where anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--faults", type=int, default=10)
    options = parser.parse_args()
    if missing():
        print(f"a soak needs {', '.join(missing())}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix=f"soak-{options.seed}-"))
    chosen = random.Random(options.seed)
    layout, partition = chosen.choice(LAYOUTS), chosen.choice(PARTITIONS)
    chain = draw(chosen, options.faults)
    print(f"seed {options.seed}, {len(chain)} faults, {layout}, partition {partition}, in {folder}", flush=True)
    began = time.monotonic()
    try:
        problems = soak(folder, chosen, chain, layout, partition)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        print("interrupted; what was started has ended")
        return 1
    for problem in problems:
        print(f"- {problem}")
    verdict = f"differs in {len(problems)} points; all is kept in {folder}" if problems else "as if undisturbed"
    print(f"seed {options.seed}: {verdict} ({time.monotonic() - began:.0f} s)")
    if not problems:
        shutil.rmtree(folder)
    return 1 if problems else 0


def soak(
    folder: Path, chosen: random.Random, chain: Sequence[tuple[Fault, str]], layout: str, partition: str
) -> list[str]:
    """Run the chain and the undisturbed run, and return all that is wrong; everything started here is ended."""
    name = f"soak-{os.getpid()}"
    tokenize_corpus(
        [Path(os.__file__).parent / "email", Path(os.__file__).parent / "asyncio"], find_vocabulary(), folder / "train",
        validation_output=folder / "validation", validation_every=10, progress=False,
    )  # fmt: skip
    settings = [
        layout, f"layout.global_batch_size={BATCH}", f"training.tokens={STEPS_PER_FAULT * len(chain) * BATCH * 32}",
        "training.validation_interval_steps=40", f"checkpoint.interval_steps={INTERVAL_STEPS}",
        "patience.start_seconds=90", "patience.step_seconds=12", "patience.save_seconds=12",
        "patience.validation_seconds=20",
    ]  # fmt: skip
    scene: Scene | None = None
    undisturbed: RunDirectory | None = None
    found: list[str] = []
    try:
        slurm = sandbox.start(name, nodes=NODES)
        os.environ.update(slurm.environment())
        run = launch_on(folder / "runs", folder, *settings, "cluster.spare_nodes=1", f"cluster.partition={partition}")
        scene = Scene(name=name, run=run, interval_steps=INTERVAL_STEPS, random=chosen)
        print(f"{'fault':70}{'moment':>9}{'attempt':>8}  {'recorded':24}{'seconds':>8}")
        next_moments = [*(moment for _, moment in chain[1:]), STEP]
        for (fault, moment), next_moment in zip(chain, next_moments, strict=True):
            row, problems = strike(scene, fault, moment, is_next_early=next_moment == EARLY)
            found += problems
            seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
            print(f"{row.fault:70}{row.moment:>9}{row.attempt:>8}  {row.recorded:24}{seconds:>8}", flush=True)
        wait("the run's end", lambda: read_status(run).state in ENDED, run, may_end=True, seconds=900)
        undisturbed = launch_on(folder / "undisturbed", folder, *settings, "cluster=local", "cluster.nodes=1",
                                "cluster.ranks_per_node=2")  # fmt: skip
        wait("the undisturbed run's end", lambda: read_status(undisturbed).state in ENDED, undisturbed, may_end=True,
             seconds=900)  # fmt: skip
        return found + problems_of(run, undisturbed, scene.damaged)
    except (SoakError, OrchestrateError) as error:
        shutil.copytree(sandbox.folder_of(name) / "log", folder / "slurm-logs", dirs_exist_ok=True)
        return [*found, str(error)]
    finally:
        end(name, scene, undisturbed)


def strike(scene: Scene, fault: Fault, moment: str, *, is_next_early: bool) -> tuple[Row, list[str]]:
    """Wait for the moment, cause a fault, and wait until the run goes on; return what is recorded amiss as well.

    Where the next fault is an early one, the run goes on as soon as there is another attempt.
    """
    run = scene.run
    wait_for_moment(scene, fault, moment)
    if fault.strikes_ranks:
        wait("ranks", scene.are_ranks_up, run)
    attempt = scene.attempt
    done = max(surviving_losses(run), default=0)
    where = phase(scene)
    if done >= read_plan(run.plan).total_steps:
        raise SoakError("the run was over before its chain of faults; it needs more steps for each")
    began = time.monotonic()
    detail = fault.cause(scene)
    if fault.needs_person:
        wait("the run's end", lambda: read_status(run).state in ENDED, run, may_end=True)
        partition = scene.random.choice(PARTITIONS)
        is_moved = read_plan(run.plan).settings.cluster.partition != partition
        resume(run, prepare_resume(run, [f"cluster.partition={partition}"] if is_moved else []), "the soak")
    if is_next_early:
        wait("another attempt", lambda: scene.attempt.number > attempt.number and scene.attempt.job.exists(), run)
        seconds = None
    else:
        wait("a new step", lambda: goes_on(scene, fault, attempt.number, done), run)
        seconds = time.monotonic() - began
    scene.repair()
    scene.remove_groups()
    recorded, problems = judge(scene, fault, attempt.number)
    name = f"{fault.name}: {detail}" if detail else fault.name
    row = Row(fault=name, moment=where, attempt=attempt.number, recorded=recorded, seconds=seconds)
    return row, [f"{name} ({where}): {problem}" for problem in problems]


def wait_for_moment(scene: Scene, fault: Fault, moment: str) -> None:
    """Wait until a fault is to strike."""
    run = scene.run
    if moment == EARLY:
        wait("an attempt", lambda: bool(run.attempts()) and scene.attempt.job.exists(), run)
        time.sleep(scene.random.uniform(0, EARLY_SECONDS))  # when it strikes
        return
    before = saved(scene)

    def has_saved() -> bool:
        """Whether the attempt has saved more than was ever saved, and there is enough that is whole."""
        found = complete_checkpoints(run)
        whole = [checkpoint for checkpoint in found if checkpoint.name not in scene.damaged]
        return (
            len(whole) >= fault.whole_checkpoints
            and found[-1].step > before
            and found[-1].facts.attempt == scene.attempt.number
        )

    wait("a checkpoint", has_saved, run)
    until = complete_checkpoints(run)[-1].step + scene.random.randrange(INTERVAL_STEPS)
    wait(f"step {until}", lambda: newest_step(scene) >= until, run)
    if moment == SAVE:
        wait("a save", lambda: is_saving(scene), run, pause=0.002)


def saved(scene: Scene) -> int:
    """Return the newest step that was ever saved, also where it is damaged by now."""
    outcomes = [attempt.read_outcome() for attempt in scene.run.attempts()]
    told = [int(outcome["saved_step"]) for outcome in outcomes if outcome is not None]
    return max([*told, *(checkpoint.step for checkpoint in complete_checkpoints(scene.run))], default=0)


def goes_on(scene: Scene, fault: Fault, number: int, done: int) -> bool:
    """Whether the attempt that a fault met, or the one after its end, has done a step that nobody had done."""
    newest = scene.attempt.number
    if not fault.recorded_as or newest == number:
        return not fault.recorded_as and newest_step(scene) > done
    return newest_step(scene) > max(done, *(last_step(attempt) for attempt in scene.run.attempts()[:-1]))


def is_saving(scene: Scene) -> bool:
    mine = scene.run.checkpoints_folder.glob(f"*.attempt_{scene.attempt.number:04d}")
    return any(not (path / MARKER).exists() for path in mine)


def newest_step(scene: Scene) -> int:
    """Return the last step that the newest attempt has done."""
    return last_step(scene.attempt)


def last_step(attempt: AttemptDirectory) -> int:
    return max((event.step for _, event in read_events(attempt.events) if isinstance(event, StepEvent)), default=0)


def phase(scene: Scene) -> str:
    """Say what the newest attempt is doing."""
    if not (scene.attempt.checks / "choice.json").exists():
        return "checks"
    if not newest_step(scene):
        return "start"
    return "save" if is_saving(scene) else f"step {newest_step(scene)}"


def judge(scene: Scene, fault: Fault, number: int) -> tuple[str, list[str]]:
    """Return how the attempt that a fault met has ended, and what of it is none of what the fault leads to."""
    outcome = scene.run.attempt(number).read_outcome()
    newest = scene.attempt.number
    if not fault.recorded_as:
        return "", [] if newest == number else [f"attempt {number} has ended: {outcome}"]
    if outcome is None:
        return "", [f"attempt {number} has no outcome, and the newest is {newest}"]
    problems = []
    if outcome["cause"] not in fault.recorded_as or outcome["action"] not in fault.actions:
        problems.append(f"attempt {number} is recorded as {outcome['cause']}, {outcome['action']}: "
                        f"{outcome['message']}; evidence {outcome['evidence']}")  # fmt: skip
    for other in range(number + 1, newest):
        more = scene.run.attempt(other).read_outcome() or {}
        problems.append(f"attempt {other} ended as well: {more.get('cause')}, {more.get('message')}")
    return f"{outcome['cause']}, {outcome['action']}", problems


def wait(
    what: str,
    condition: Callable[[], bool],
    run: RunDirectory,
    *,
    may_end: bool = False,
    seconds: float = DEADLINE_SECONDS,
    pause: float = 0.1,
) -> None:
    """Wait for something.

    Raises:
        SoakError: it did not come, or the run has ended before.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        is_over = not may_end and has_stopped(run)
        if is_over or time.monotonic() > deadline:
            why = "the run ended" if is_over else f"waited {seconds:.0f} s"
            logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in run.jobs.glob("*.out"))
            status = read_status(run)
            raise SoakError(f"{why} before {what}: {status.state}, {status.cause}: {status.reason}\n{logs}")
        time.sleep(pause)


def has_stopped(run: RunDirectory) -> bool:
    """Whether nobody goes on with a run, as its folder says."""
    outcome = run.attempts()[-1].read_outcome() if run.attempts() else None
    if outcome is None or len(run.submissions()) > outcome["submissions"]:
        return False
    return outcome["action"] in (Action.STOP, Action.FINISH)


def end(name: str, scene: Scene | None, undisturbed: RunDirectory | None) -> None:
    """End everything that was started."""
    if sandbox.find(name) is not None:
        sandbox.stop(name, patience_seconds=2)
    if undisturbed is not None and read_status(undisturbed).state not in ENDED:
        cancel(undisturbed)
    for run in (scene.run if scene is not None else None, undisturbed):
        if run is not None:
            left = processes_of(run)
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=10)
    if scene is not None:
        scene.remove_groups()


if __name__ == "__main__":
    sys.exit(main())
