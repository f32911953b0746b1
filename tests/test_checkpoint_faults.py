"""What happens to checkpoints when things go wrong, each caused for real; docs/log.md has the table of outcomes.

In each: what must survive survives, what happened is said, and nothing random is trained.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_solar.checkpoint import CheckpointWriter, OwnedPiece
from megatron_solar.pieces import Rectangle
from megatron_solar.run_state import check_room
from orchestrator import exit_codes
from orchestrator.checkpoint_keeper import mark_left_over
from orchestrator.checkpoints import (
    DAMAGED,
    MARKER,
    Checkpoint,
    checkpoint_name,
    complete_checkpoints,
    damage,
    part_file,
    part_record,
    read_checkpoint,
    read_parts,
)
from orchestrator.errors import DiskFullError
from orchestrator.events import (
    CheckpointEvent,
    DamageEvent,
    RepeatEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    read_events,
)
from orchestrator.files import JsonLines, read_json
from orchestrator.plan import TrainingPlan, make_plan, write_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm.rank_watch import PEER_GRACE_SECONDS
from orchestrator.slurm.ranks import Ranks
from tests.conftest import Trainer, events_of, losses

DP2 = ("cluster.ranks_per_node=2",)
# 8.2 M parameters: a rank's file has 49 MB, so that a save takes long enough to be hit in its middle.
LARGE = (*DP2, "model.hidden_size=128", "model.ffn_hidden_size=128", "checkpoint.keep_last=2")
SAVE_EVERY = 2
WATCH_SECONDS = 60


def starts_from(attempt: AttemptDirectory) -> str:
    (start,) = [event for event in events_of(attempt) if isinstance(event, StartEvent)]
    return start.loaded_from


def steps_done(attempt: AttemptDirectory) -> dict[int, float]:
    return {event.step: event.loss for event in events_of(attempt) if isinstance(event, StepEvent)}


# A kill at ten moments of an asynchronous save.


def final_bytes(run: RunDirectory) -> int:
    """Return the size of rank 0's file, which is the same in every save."""
    return complete_checkpoints(run)[0].files[part_file(0)].bytes


def partial_is(share: float) -> Callable[[Path, int], bool]:
    def reached(folder: Path, whole: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return (folder / f".{part_file(0)}.partial").stat().st_size >= share * whole
        return (folder / part_file(0)).exists()

    return reached


MOMENTS: dict[str, Callable[[Path, int], bool]] = {
    "before its first file": lambda folder, _: folder.exists(),
    "its first file begun": partial_is(0.0),
    "a quarter written": partial_is(0.25),
    "half written": partial_is(0.5),
    "three quarters written": partial_is(0.75),
    "written, not flushed": partial_is(1.0),
    "rank 0's file whole": lambda folder, _: (folder / part_file(0)).exists(),
    "one rank's record there": lambda folder, _: any((folder / part_record(rank)).exists() for rank in (0, 1)),
    "all records there, no marker": lambda folder, _: all((folder / part_record(rank)).exists() for rank in (0, 1)),
    "marked": lambda folder, _: (folder / MARKER).exists(),
}


def kill(ranks: Ranks, which: list[int]) -> None:
    """SIGKILL the clients of some ranks; the preloaded process kills their ranks with them."""
    for rank in which:
        ranks._processes[rank].send_signal(signal.SIGKILL)


def end_the_others(ranks: Ranks) -> None:
    """Do as the supervisor where a rank has died: one of 45 was seen to wait for it for ever in gloo's all-gather."""
    deadline = time.monotonic() + PEER_GRACE_SECONDS
    while len(ranks.ended()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(ranks, [0, 1])


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> list[float]:
    run, plan = trainer.make_run(*LARGE, f"checkpoint.interval_steps={SAVE_EVERY}", steps=2 * len(MOMENTS) + 2)
    return losses(trainer.train(run, plan))


@pytest.mark.parametrize("victims", [[1], [0, 1]], ids=["one rank", "all ranks"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint_and_the_same_losses(
    trainer: Trainer, undisturbed: list[float], victims: list[int]
) -> None:
    run, plan = trainer.make_run(*LARGE, f"checkpoint.interval_steps={SAVE_EVERY}", steps=2 * len(MOMENTS) + 2)
    attempt, ranks = trainer.start(run, plan)  # the step-0 checkpoint, then away
    wait_for(lambda: read_parts(run.checkpoint_path(checkpoint_name(0, 1)), 2) is not None)
    kill(ranks, [0, 1])
    trainer.wait(run, attempt, ranks)
    whole = final_bytes(run)
    outcomes = []
    for moment, is_reached in MOMENTS.items():
        before = complete_checkpoints(run)[-1]
        attempt, ranks = trainer.start(run, plan)
        step = before.step + SAVE_EVERY
        folder = run.checkpoint_path(checkpoint_name(step, attempt.number))

        if moment == "marked":
            wait_for(functools.partial(MOMENTS["all records there, no marker"], folder, whole))
            trainer.keep(run, attempt)
        wait_for(functools.partial(is_reached, folder, whole))
        kill(ranks, victims)
        end_the_others(ranks)
        trainer.wait(run, attempt, ranks)  # what both have written is marked
        after = complete_checkpoints(run)
        assert all(damage(checkpoint) == [] for checkpoint in after), moment
        assert starts_from(attempt) == before.name
        assert after[-1].step in (before.step, step), moment
        for done, loss in steps_done(attempt).items():
            assert loss == undisturbed[done - 1], (moment, done)
        outcomes.append((moment, "survives" if after[-1].step == step else "the one before is used"))
    print("\n".join(f"{moment}: {outcome}" for moment, outcome in outcomes))
    by_moment = dict(outcomes)
    # A machine that is busy may let a rank finish before the kill arrives, but hardly five times.
    assert "the one before is used" in [by_moment[moment] for moment in list(MOMENTS)[:5]]
    assert by_moment["all records there, no marker"] == by_moment["marked"] == "survives"
    last = trainer.train(run, plan)
    assert losses(last) == undisturbed[-len(losses(last)) :]
    # Nothing half-written stays: each folder is complete by now.
    assert all((path / MARKER).exists() for path in run.checkpoints_folder.iterdir())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WATCH_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {WATCH_SECONDS} s"
        time.sleep(0.0005)


# Files that are not what they were.


@pytest.fixture(scope="module")
def trained(trainer: Trainer) -> tuple[RunDirectory, TrainingPlan, list[float]]:
    """A run of 6 steps with checkpoints of steps 0, 2, 4 and 6, and its losses."""
    run, plan = trainer.make_run(*DP2, "checkpoint.interval_steps=2", "checkpoint.keep_last=9", steps=6)
    attempt = trainer.train(run, plan)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [0, 2, 4, 6]
    return run, plan, losses(attempt)


@pytest.fixture
def damaged_at_4(
    trainer: Trainer, trained: tuple[RunDirectory, TrainingPlan, list[float]]
) -> tuple[RunDirectory, TrainingPlan]:
    """A copy of that run as if it had been lost after step 4."""
    source, plan, _ = trained
    run, _ = trainer.make_run()
    shutil.rmtree(run.checkpoints_folder)
    shutil.copytree(source.checkpoints_folder, run.checkpoints_folder)
    shutil.copytree(source.attempts_folder, run.attempts_folder, dirs_exist_ok=True)
    shutil.rmtree(run.checkpoint_path(checkpoint_name(6, 1)))
    write_plan(run.launched_plan, plan)
    return run, plan


def flip(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / part_file(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path} does not have the SHA-256 that was recorded when it was written"


def truncate(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / part_file(0)
    os.truncate(path, path.stat().st_size - 8)
    return f"{path} should have {checkpoint.files[path.name].bytes} bytes, found {path.stat().st_size}"


def delete(checkpoint: Checkpoint) -> str:
    (checkpoint.path / part_file(1)).unlink()
    return f"{checkpoint.path / part_file(1)} is missing"


def leave_the_marker_only(checkpoint: Checkpoint) -> str:
    for path in checkpoint.path.iterdir():
        if path.name != MARKER:
            path.unlink()
    return f"{checkpoint.path / 'tensors.json'} is missing"


@pytest.mark.parametrize("fault", [flip, truncate, delete, leave_the_marker_only])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    trainer: Trainer,
    trained: tuple[RunDirectory, TrainingPlan, list[float]],
    damaged_at_4: tuple[RunDirectory, TrainingPlan],
    fault: Callable[[Checkpoint], str],
) -> None:
    run, plan = damaged_at_4
    newest = complete_checkpoints(run)[-1]
    problem = fault(newest)
    attempt = trainer.train(run, plan)
    (told,) = [event for event in events_of(attempt) if isinstance(event, DamageEvent)]
    assert (told.step, told.name) == (4, newest.name)
    assert problem in told.problems
    assert starts_from(attempt) == checkpoint_name(2, 1)
    assert losses(attempt) == trained[2][2:]
    assert read_json(newest.path / DAMAGED)["problems"] == list(told.problems)  # it goes once two are newer
    assert [(c.step, c.attempt) for c in complete_checkpoints(run)] == [(0, 1), (2, 1), (4, 2), (6, 2)]
    (repeated,) = [event for event in events_of(attempt) if isinstance(event, RepeatEvent)]
    assert (repeated.first_step, repeated.last_step) == (3, 6)  # attempt 1 had done them, and recorded the same bits
    assert (repeated.relative_difference, repeated.is_beyond_noise) == (0.0, False)


def test_when_no_checkpoint_is_whole_all_are_named_and_nothing_is_trained(
    trainer: Trainer, damaged_at_4: tuple[RunDirectory, TrainingPlan]
) -> None:
    run, plan = damaged_at_4
    problems = [flip(complete_checkpoints(run)[0]), delete(complete_checkpoints(run)[1])]
    problems.append(truncate(complete_checkpoints(run)[2]))
    attempt, ranks = trainer.start(run, plan)
    assert trainer.wait(run, attempt, ranks) == [exit_codes.BAD_CHECKPOINT] * 2
    log = attempt.rank_log(0).read_text()
    assert "none of 3 checkpoints is whole; nothing was loaded" in log
    assert all(problem in log for problem in problems)
    assert steps_done(attempt) == {}
    again, ranks = trainer.start(run, plan)  # and the base does not take their place either
    assert set(trainer.wait(run, again, ranks)) == {exit_codes.BAD_CHECKPOINT}
    assert steps_done(again) == {}


# Checkpoints that are not this run's.


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("model.ffn_hidden_size=128",), "model.ffn_hidden_size is 96 in the checkpoint and 128 in the run"),
        (("training.seed=5",), "put the data sets back as they were"),
        (("data.sequence_length=16", "layout.global_batch_size=8"), "put the data sets back as they were"),
    ],
    ids=["another shape", "another order", "other samples"],
)
def test_a_foreign_checkpoint_is_refused_by_name(
    trainer: Trainer,
    trained: tuple[RunDirectory, TrainingPlan, list[float]],
    overrides: tuple[str, ...],
    problem: str,
) -> None:
    run, plan = trainer.make_run(*DP2, *overrides)
    foreign = complete_checkpoints(trained[0])[-1]
    shutil.copytree(foreign.path, run.checkpoint_path(foreign.name))
    attempt, ranks = trainer.start(run, plan)
    assert set(trainer.wait(run, attempt, ranks)) == {exit_codes.BAD_CHECKPOINT}
    assert problem in attempt.rank_log(0).read_text()
    assert steps_done(attempt) == {}


def test_a_checkpoint_of_another_tokenizer_or_of_other_text_is_refused_by_name(
    trainer: Trainer, trained: tuple[RunDirectory, TrainingPlan, list[float]], tmp_path: Path, tokenizer: Path
) -> None:
    import sentencepiece

    from orchestrator.tokenize.stage import tokenize_corpus

    text = tmp_path / "text.txt"
    text.write_text(Path(dataclasses.__file__).read_text())
    with (tmp_path / "other.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.read_text().splitlines()), model_writer=model, vocab_size=400, minloglevel=2
        )
    # Real runs on other data: one of them reads this run's checkpoint, as if it had been copied there.
    foreign = complete_checkpoints(trained[0])[-1]
    for vocabulary, problem in (
        (tmp_path / "other.model", "its data was made with tokenizer "),
        (tokenizer, "put the data sets back as they were"),
    ):
        data = tmp_path / f"data-{vocabulary.name}"
        tokenize_corpus([text], vocabulary, data, progress=False)
        run, plan = trainer.make_run(*DP2, f"data.train={data}", "data.validation=[]", steps=2)
        shutil.copytree(foreign.path, run.checkpoint_path(foreign.name))
        attempt, ranks = trainer.start(run, plan)
        assert set(trainer.wait(run, attempt, ranks)) == {exit_codes.BAD_CHECKPOINT}
        assert problem in attempt.rank_log(0).read_text()
        assert steps_done(attempt) == {}


def test_what_ranks_had_written_when_their_supervisor_was_lost_is_marked_by_the_next_one(trainer: Trainer) -> None:
    run, plan = trainer.make_run(*DP2, "checkpoint.interval_steps=2", steps=4)
    _, ranks = trainer.start(run, plan)
    assert {process.wait(timeout=120) for process in ranks._processes.values()} == {0}
    assert complete_checkpoints(run) == []  # nobody was there to mark them
    told_to = run.path / "notes.jsonl"
    notes = JsonLines(told_to)
    mark_left_over(run, notes)
    notes.close()
    assert [(c.step, c.attempt) for c in complete_checkpoints(run)] == [(0, 1), (2, 1), (4, 1)]
    told = [event.name for _, event in read_events(told_to) if isinstance(event, CheckpointEvent)]
    assert told == [checkpoint_name(step, 1) for step in (0, 2, 4)]


# Ranks of a start that was given up, and are not dead.


def test_ranks_of_an_old_start_that_still_write_change_nothing(
    trainer: Trainer, trained: tuple[RunDirectory, TrainingPlan, list[float]]
) -> None:
    run, plan = trainer.make_run(*DP2, "checkpoint.interval_steps=2", "checkpoint.keep_last=9", steps=6)
    old, old_ranks = trainer.start(run, plan)
    wait_for(lambda: read_parts(run.checkpoint_path(checkpoint_name(0, 1)), 2) is not None)
    trainer.keep(run, old)  # the last that the old supervisor did
    assert [(c.step, c.attempt) for c in complete_checkpoints(run)] == [(0, 1)]
    new, new_ranks = trainer.start(run, plan)
    assert {process.wait(timeout=120) for process in old_ranks._processes.values()} == {0}  # it went on to the end
    trainer.wait(run, new, new_ranks)
    assert starts_from(new) == checkpoint_name(0, 1)
    assert losses(new) == trained[2]
    assert [(c.step, c.attempt) for c in complete_checkpoints(run)] == [(0, 1), (2, 2), (4, 2), (6, 2)]
    old_saves = [event.name for event in events_of(old) if isinstance(event, SaveEvent)]
    assert checkpoint_name(6, 1) in old_saves  # it did save, under a name of its own
    assert not (run.checkpoint_path(checkpoint_name(6, 1)) / MARKER).exists()


# A start from a folder.


def test_the_base_is_read_by_one_replica_once_and_never_again(
    trainer: Trainer, tmp_path: Path, tokenizer: Path
) -> None:
    from tests.test_conversion import make_base, shape_overrides

    base = make_base(tmp_path / "base", tokenizer)
    overrides = (*shape_overrides(base), f"base={base}", *DP2, "checkpoint.interval_steps=2")
    run, plan = trainer.make_run(*overrides, steps=4)
    whole = losses(trainer.train(run, plan))

    run, plan = trainer.make_run(*overrides, steps=4)
    attempt, ranks = trainer.start(run, plan)
    wait_for(lambda: read_parts(run.checkpoint_path(checkpoint_name(0, 1)), 2) is not None)
    kill(ranks, [0, 1])
    trainer.wait(run, attempt, ranks)
    first = next(event for event in events_of(attempt) if not isinstance(event, StartEvent))
    assert isinstance(first, SaveEvent) and first.step == 0
    shutil.rmtree(base)
    assert losses(trainer.train(run, plan)) == whole


def test_a_base_that_lacks_tensors_is_refused_with_their_names(
    trainer: Trainer, tmp_path: Path, tokenizer: Path
) -> None:
    import safetensors.torch

    from tests.test_conversion import make_base, shape_overrides

    base = make_base(tmp_path / "base", tokenizer)
    run, plan = trainer.make_run(*shape_overrides(base), f"base={base}", *DP2, steps=1)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.ones(3)
    safetensors.torch.save_file(tensors, base / "model.safetensors")
    attempt, ranks = trainer.start(run, plan)
    assert exit_codes.BAD_CONFIG in trainer.wait(run, attempt, ranks)
    log = attempt.rank_log(0).read_text()
    assert "model.layers.1.mlp.up_proj.weight" in log  # missing
    assert "model.layers.9.mlp.up_proj.weight" in log  # extra
    assert "model.norm.weight" in log  # misshapen
    assert complete_checkpoints(run) == []


# A full disk.


def piece_of(megabytes: int) -> OwnedPiece:
    count = megabytes * 1_000_000 // 4
    rectangle = Rectangle(offset=(0,), size=(count,), start=0)
    return OwnedPiece(
        name="weight/w", shape=(count,), rectangle=rectangle, values=torch.arange(count).float(), is_written=True
    )


def test_a_disk_that_fills_while_a_rank_writes_is_told_and_gives_its_space_back(
    mount_disk: Callable[..., Path],
) -> None:
    disk = mount_disk(30)
    writer = CheckpointWriter(0)
    writer.save(disk / "first", [piece_of(20)])
    writer.wait()
    used = shutil.disk_usage(disk).used
    writer.save(disk / "second", [piece_of(20)])
    with pytest.raises(DiskFullError, match=r"second needs 20 MB, .* are free \(No space left on device\)"):
        writer.wait()
    assert list((disk / "second").iterdir()) == []
    assert shutil.disk_usage(disk).used == used
    assert read_parts(disk / "first", 1) is not None


def test_a_save_without_room_or_inodes_is_refused_before_a_byte_is_written(
    trainer: Trainer, mount_disk: Callable[..., Path]
) -> None:
    _, plan = trainer.make_run()
    needed = plan.checkpoint_bytes
    room, no_room = mount_disk(needed // 1_000_000 + 20), mount_disk(needed // 1_000_000 - 5)
    no_inodes = mount_disk(needed // 1_000_000 + 20, inodes=3)
    check_room(room / "step", plan)
    with pytest.raises(DiskFullError, match="are free; free space or raise the quota"):
        check_room(no_room / "step", plan)
    with pytest.raises(DiskFullError):
        check_room(no_inodes / "step", plan)
    assert not any(list(disk.iterdir()) for disk in (room, no_room, no_inodes))


def test_the_losses_of_other_settings_are_not_compared(
    trainer: Trainer, damaged_at_4: tuple[RunDirectory, TrainingPlan]
) -> None:
    run, plan = damaged_at_4
    shutil.rmtree(run.checkpoint_path(checkpoint_name(4, 1)))
    training = dataclasses.replace(plan.settings.training, learning_rate=plan.settings.training.learning_rate / 2)
    changed = make_plan(dataclasses.replace(plan.settings, training=training))
    attempt = trainer.train(run, changed)
    assert starts_from(attempt) == checkpoint_name(2, 1)
    assert [event for event in events_of(attempt) if isinstance(event, RepeatEvent)] == []


def test_a_repeated_step_with_another_loss_is_told_at_once(
    trainer: Trainer, damaged_at_4: tuple[RunDirectory, TrainingPlan]
) -> None:
    run, plan = damaged_at_4
    events = run.attempt(1).events
    recorded = [line for line in events.read_text().splitlines() if '"kind":"step","' in line and '"step":6,' in line]
    loss = float(recorded[0].split('"loss":')[1].split(",")[0])
    events.write_text(events.read_text().replace(f'"loss":{loss}', f'"loss":{loss * 1.01}'))  # as a wrong GPU would
    attempt = trainer.train(run, plan)
    found = [event for event in events_of(attempt) if isinstance(event, RepeatEvent)]
    assert [(event.step, event.is_beyond_noise) for event in found] == [(6, True)]
    assert found[0].relative_difference == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_a_killed_rank_leaves_no_process_behind(trainer: Trainer) -> None:
    run, plan = trainer.make_run(*DP2, steps=400)
    attempt, ranks = trainer.start(run, plan)
    wait_for(lambda: bool(steps_done(attempt)))
    assert trainer._preload is not None
    children = psutil.Process(trainer._preload._process.pid).children(recursive=True)
    kill(ranks, [0, 1])
    trainer.wait(run, attempt, ranks)
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert read_checkpoint(run.checkpoint_path(checkpoint_name(0, 1))).step == 0
