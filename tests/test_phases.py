"""A blend that changes from a token on: nothing lost, nothing repeated, whatever interrupts the run in between.

What is expected is worked out here from the rule alone: in a phase the next sample comes from the data set furthest
behind its weight; each data set goes on where it was left; an epoch of a shard is read in the order of its own index.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_solar.cpu import cuda_calls_on_cpu
from megatron_solar.sample_request import request_of
from orchestrator import exit_codes
from orchestrator.checkpoints import complete_checkpoints
from orchestrator.config import compose, recompose
from orchestrator.data_ledger import data_ledger
from orchestrator.errors import ConfigError
from orchestrator.events import SaveEvent, StartEvent, StepEvent, read_events
from orchestrator.files import read_json_lines, write_json
from orchestrator.launch import BranchPoint, adopt, check_branch
from orchestrator.phases import planned_phases, steps_before
from orchestrator.plan import TrainingPlan, make_plan, read_plan, write_plan
from orchestrator.resume import prepare_resume
from orchestrator.run_directory import AttemptDirectory, RunDirectory
from orchestrator.slurm import ranks
from orchestrator.tokenize.manifest import read_manifest
from orchestrator.tokenize.stage import tokenize_corpus
from tests import reading_ranks
from tests.conftest import SMALL, Trainer, events_of, losses, relative_difference
from tests.test_resume import stop_after

LENGTH, BATCH = 32, 4
TOKENS = LENGTH * BATCH
"""Of a step."""


@pytest.fixture(scope="module", autouse=True)
def megatron_on_cpu() -> Iterator[None]:
    """Megatron is imported inside, as in every CPU worker."""
    with cuda_calls_on_cpu():
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    """Three small data sets: `a` of several shards, `b` so small that it comes to its second epoch, and `c`."""
    folder, library = tmp_path_factory.mktemp("sets"), Path(os.__file__).parent
    sources = {"a": library / "json", "b": library / "json" / "scanner.py", "c": library / "wsgiref" / "headers.py"}
    for name, source in sources.items():
        tokenize_corpus([source], tokenizer, folder / name, shard_tokens=6000, progress=False)
    assert len(read_manifest(folder / "a").shards) > 1
    return {name: folder / name for name in sources}


def phase(from_steps: float, train: Sequence[Path], weights: Sequence[float] = ()) -> str:
    return (
        f"{{from_tokens: {round(from_steps * TOKENS)}, train: [{','.join(map(str, train))}], weights: {list(weights)}}}"
    )


def words(sets: dict[str, Path], *phases: str) -> list[str]:
    """`a` and `b` as one to one, then what is said."""
    return [f"data.train=[{sets['a']},{sets['b']}]", "data.weights=[1,1]", f"data.phases=[{','.join(phases)}]"]


def plan_of(words: Sequence[str], steps: int) -> TrainingPlan:
    return make_plan(
        compose(
            "demo-base", [*SMALL, "name=planned", "data.validation=[]", f"training.tokens={steps * TOKENS}", *words]
        )
    )


Place = tuple[str, int]
"""Prefix of a shard, and the sample's number in it, counted over its epochs."""


def furthest_behind(shares: Sequence[float], count: int) -> list[int]:
    """Choose `count` times the one that is furthest behind its share."""
    taken, chosen = [0] * len(shares), []
    for number in range(count):
        behind = [share / sum(shares) * max(number, 1) - done for share, done in zip(shares, taken, strict=True)]
        chosen.append(behind.index(max(behind)))
        taken[chosen[-1]] += 1
    return chosen


def expected_places(phases: Sequence[tuple[int, Sequence[tuple[Path, float]]]], total: int) -> list[Place]:
    """Return where each sample comes from: phases as (first sample, data sets with their weights)."""
    read: Counter[str] = Counter()
    found: list[Place] = []
    for (begin, blend), end in zip(phases, [*(begin for begin, _ in phases[1:]), total], strict=True):
        shards, shares = [], []
        for folder, weight in blend:
            counts = {shard.name: (shard.tokens - 1) // LENGTH for shard in read_manifest(folder).shards}
            for name, count in counts.items():
                if count:
                    shards.append(str(folder / name))
                    shares.append(weight * count / sum(counts.values()))
        for chosen in furthest_behind(shares, end - begin):
            found.append((shards[chosen], read[shards[chosen]]))
            read[shards[chosen]] += 1
    return found


def places_of(plan: TrainingPlan, cache: Path) -> list[Place]:
    """Return where each sample of a plan comes from, as a run would read it."""
    from megatron_solar.data import open_samples

    request = request_of(plan)
    source, train = request.train, open_samples(request, cache).train
    places = map(train.place, range(len(train)))
    return [(source.prefixes[shard], epoch * source.epoch_samples[shard] + sample) for shard, epoch, sample in places]


def test_a_phase_begins_with_the_first_whole_step_and_shards_go_on_where_they_were_left(
    tmp_path: Path, sets: dict[str, Path]
) -> None:
    a, b, c = sets["a"], sets["b"], sets["c"]
    plan = plan_of(words(sets, phase(10.3, [b, c], [1, 3]), phase(25, [c, a], [1, 9])), 60)
    assert [found.first_step for found in planned_phases(plan)] == [1, 12, 26]
    expected = expected_places(
        [(0, [(a, 1), (b, 1)]), (11 * BATCH, [(b, 1), (c, 3)]), (25 * BATCH, [(c, 1), (a, 9)])], 60 * BATCH
    )
    found = places_of(plan, tmp_path / "phases")
    assert found == expected
    read = Counter(prefix for prefix, _ in found)
    for prefix, count in read.items():  # nothing lost, nothing repeated
        assert [number for where, number in found if where == prefix] == list(range(count))
    sizes = dict(zip(request_of(plan).train.prefixes, request_of(plan).train.epoch_samples, strict=True))
    assert any(read[prefix] > size for prefix, size in sizes.items())  # beyond an epoch


def test_a_longer_run_and_one_with_a_further_phase_begin_with_the_same_samples(
    tmp_path: Path, sets: dict[str, Path]
) -> None:
    second = phase(10, [sets["b"], sets["c"]], [1, 3])
    alone = places_of(plan_of(words(sets), 30), tmp_path / "alone")
    short = places_of(plan_of(words(sets, second), 20), tmp_path / "short")
    long = places_of(plan_of(words(sets, second, phase(25, [sets["a"]])), 40), tmp_path / "long")
    assert short[: 10 * BATCH] == alone[: 10 * BATCH]
    assert short != alone[: 20 * BATCH]
    assert long[: 20 * BATCH] == short


def test_a_phase_after_the_last_step_changes_nothing(sets: dict[str, Path]) -> None:
    plain, planned = plan_of(words(sets), 10), plan_of(words(sets, phase(10, [sets["c"]])), 10)
    assert request_of(planned).train == request_of(plain).train
    assert request_of(planned).digests() == request_of(plain).digests()
    assert request_of(planned).fingerprint_at(40) == request_of(plain).fingerprint_at(40)


def test_a_copy_of_a_data_set_elsewhere_goes_on_where_the_first_was_left(tmp_path: Path, sets: dict[str, Path]) -> None:
    copy = Path(shutil.copytree(sets["b"], tmp_path / "elsewhere"))
    there = places_of(plan_of(words(sets, phase(8, [copy])), 20), tmp_path / "there")
    here = places_of(plan_of(words(sets, phase(8, [sets["b"]])), 20), tmp_path / "here")
    assert there == here


def test_a_data_set_named_twice_is_two_of_which_each_goes_on(tmp_path: Path, sets: dict[str, Path]) -> None:
    a, b = sets["a"], sets["b"]
    twice = [f"data.train=[{a},{b},{b}]", "data.weights=[2,1,1]", f"data.phases=[{phase(5, [b, b], [1, 3])}]"]
    found = places_of(plan_of(twice, 20), tmp_path / "twice")
    of_b = Counter(number for prefix, number in found if Path(prefix).parent == b)
    first = [number for prefix, number in found[: 5 * BATCH] if Path(prefix).parent == b]
    assert first == [n for n in range(len(first) // 2) for _ in range(2)]
    assert set(of_b.values()) == {1, 2}


def test_the_fingerprint_is_that_of_what_was_read(sets: dict[str, Path]) -> None:
    second = phase(10, [sets["b"], sets["c"]], [1, 3])
    plain, planned = request_of(plan_of(words(sets), 30)), request_of(plan_of(words(sets, second), 30))
    facts = {
        "order": 2,
        "train": [read_manifest(sets[name]).fingerprint for name in ("a", "b")],
        "weights": [1.0, 1.0],
        "sequence_length": LENGTH,
        "seed": 1234,
    }
    before_phases = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert {plain.fingerprint_at(count) for count in (0, 40, 120)} == {before_phases}
    assert planned.fingerprint_at(40) == before_phases
    assert planned.fingerprint_at(41) == planned.fingerprint_at(120) != before_phases
    others = [
        phase(11, [sets["b"], sets["c"]], [1, 3]),
        phase(10, [sets["c"], sets["b"]], [1, 3]),
        phase(10, [sets["b"], sets["c"]], [1, 2]),
        phase(10, [sets["b"], sets["c"]]),
    ]
    found = {request_of(plan_of(words(sets, other), 30)).fingerprint_at(120) for other in others}
    assert len(found) == 4 and planned.fingerprint_at(120) not in found


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (128, 1), (129, 2), (1280, 10), (1281, 11), (12_801, 101)])
def test_the_steps_that_read_so_many_tokens_are_found(sets: dict[str, Path], tokens: int, expected: int) -> None:
    assert steps_before(plan_of(words(sets), 20), tokens) == expected


def test_what_is_wrong_with_phases_is_named_at_once(sets: dict[str, Path]) -> None:
    wrong = [phase(0, [sets["a"]], [1, 2]), phase(3, []), phase(2, [sets["a"]], [-1])]
    with pytest.raises(ConfigError) as raised:
        plan_of(words(sets, *wrong), 20)
    text = str(raised.value)
    for said in (
        "data.phases[0].from_tokens=0 should be above 0",
        "data.phases[0].weights has 2 entries for 1 data sets",
        "data.phases[1].train names no data set",
        "data.phases[2].from_tokens=256 should be above 384",
        "data.phases[2].weights=[-1.0] should all be above 0",
    ):
        assert said in text


# The whole of it with ranks


PHASES = (10, 25)
STEPS = 48
ATTEMPTS = (
    ("layout.tensor_parallel=1", "cluster.ranks_per_node=1"),
    ("layout.tensor_parallel=1", "cluster.ranks_per_node=1"),
    ("layout.tensor_parallel=1", "cluster.ranks_per_node=2"),
    ("layout.tensor_parallel=2", "cluster.ranks_per_node=2"),
)
KILLED_AFTER = (13, 27, 33)
"""Steps of which the first three attempts have told when all their ranks are killed; the last one ends."""


def phased(sets: dict[str, Path]) -> list[str]:
    return words(sets, phase(PHASES[0], [sets["b"], sets["c"]], [1, 3]), phase(PHASES[1], [sets["c"], sets["a"]]))


def expected_of_run(sets: dict[str, Path]) -> list[Place]:
    a, b, c = sets["a"], sets["b"], sets["c"]
    by_tokens = [(folder, sum((s.tokens - 1) // LENGTH for s in read_manifest(folder).shards)) for folder in (c, a)]
    blends = [(0, [(a, 1), (b, 1)]), (PHASES[0] * BATCH, [(b, 1), (c, 3)]), (PHASES[1] * BATCH, by_tokens)]
    return expected_places(blends, STEPS * BATCH)


def tokens_at(places: Sequence[Place], folder: Path, seed: int = 1234) -> list[str]:
    """Return a hash of the tokens of each sample, from megatron's index files and the .bin alone."""
    arrays = {}
    for description in folder.glob("*-description.txt"):
        facts = json.loads(description.read_text())
        base = str(description).removesuffix("description.txt")
        arrays[facts["dataset_path"], facts["random_seed"]] = [
            np.load(f"{base}{name}.npy") for name in ("document_index", "sample_index", "shuffle_index")
        ]
    found = []
    for prefix, number in places:
        manifest = read_manifest(Path(prefix).parent)
        shard = next(s for s in manifest.shards if s.name == Path(prefix).name)
        epoch, sample = divmod(number, (shard.tokens - 1) // LENGTH)
        documents, samples, shuffle = arrays[prefix, seed + epoch]
        tokens = np.fromfile(f"{prefix}.bin", np.dtype(shard.dtype))
        lengths = np.frombuffer(Path(f"{prefix}.idx").read_bytes(), np.int32, shard.documents, 34)
        begins = np.concatenate([[0], np.cumsum(lengths)])
        (first, start), (last, stop) = samples[shuffle[sample]], samples[shuffle[sample] + 1]
        parts = []
        for place in range(first, last + 1):
            document = documents[place]
            begin = begins[document] + (start if place == first else 0)
            end = begins[document] + stop + 1 if place == last else begins[document + 1]
            parts.append(tokens[begin:end])
        whole = np.concatenate(parts).astype(np.int64)
        assert len(whole) == LENGTH + 1
        found.append(hashlib.sha256(whole[:LENGTH].tobytes()).hexdigest())
    return found


def seen_in_steps(run: RunDirectory, attempt: AttemptDirectory) -> dict[int, Counter[str]]:
    """Return the hashes of what an attempt's ranks read in each step; ranks of one replica read the same."""
    (begun,) = [event.step for event in events_of(attempt) if isinstance(event, StartEvent)]
    found: dict[int, dict[int, list[str]]] = {}
    for path in (run.path / reading_ranks.SEEN).glob(f"{attempt.number}.*.jsonl"):
        for step, (_, line) in enumerate(read_json_lines(path), begun + 1):
            of_replicas = found.setdefault(step, {})
            assert of_replicas.setdefault(line["data_rank"], line["hashes"]) == line["hashes"]
    return {step: Counter(h for hashes in of.values() for h in hashes) for step, of in found.items()}


@pytest.fixture(scope="module")
def interrupted(trainer: Trainer, sets: dict[str, Path]) -> Iterator[RunDirectory]:
    """A run through three phases whose ranks were killed three times, and whose layout changed twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "WORKER", reading_ranks.__name__)
        run, plan = trainer.make_run(*phased(sets), "checkpoint.interval_steps=4", steps=STEPS)
        for number, layout in enumerate(ATTEMPTS):
            plan = make_plan(recompose(plan.settings, layout))
            write_plan(run.launched_plan, plan)
            if number == len(KILLED_AFTER):
                trainer.train(run, plan)
                continue
            attempt, processes = trainer.start(run, plan)
            deadline = time.monotonic() + 120
            while not any(isinstance(e, StepEvent) and e.step >= KILLED_AFTER[number] for e in events_of(attempt)):
                assert time.monotonic() < deadline, attempt.rank_log(0).read_text()
                time.sleep(0.002)
            processes.kill()
            trainer.keep(run, attempt)
        yield run


@pytest.mark.fault
def test_killed_and_moved_to_other_layouts_a_run_reads_the_planned_samples(
    interrupted: RunDirectory, sets: dict[str, Path]
) -> None:
    expected = tokens_at(expected_of_run(sets), interrupted.data_index / "train")
    steps: dict[int, Counter[str]] = {}
    begun = []
    for attempt in interrupted.attempts():
        seen = seen_in_steps(interrupted, attempt)
        steps |= seen  # what an attempt did again counts, not what was lost
        begun.append(min(seen))
    assert len(begun) == 4 and begun[0] == 1 < begun[1] and begun == sorted(begun)
    assert {number % 4 for number in begun} == {1}  # each from a checkpoint
    assert steps == {step: Counter(expected[(step - 1) * BATCH : step * BATCH]) for step in range(1, STEPS + 1)}


@pytest.mark.fault
def test_at_one_layout_the_losses_are_those_of_a_run_never_killed(
    trainer: Trainer, interrupted: RunDirectory, sets: dict[str, Path]
) -> None:
    undisturbed, plan = trainer.make_run(*phased(sets), steps=STEPS)
    whole = losses(trainer.train(undisturbed, plan))
    told = [{e.step: e.loss for e in events_of(a) if isinstance(e, StepEvent)} for a in interrupted.attempts()]
    assert max(told[1]) > PHASES[1]  # through both changes of the blend
    assert [*(told[0] | told[1]).values()] == whole[: max(told[1])]
    rest = told[2] | told[3]
    assert relative_difference([rest[step] for step in sorted(rest)], whole[min(rest) - 1 :]) < 1e-6


@pytest.mark.fault
def test_the_ledger_of_a_run_that_was_killed_equals_the_planned_one(
    interrupted: RunDirectory, sets: dict[str, Path]
) -> None:
    expected = expected_of_run(sets)
    ledger = data_ledger(interrupted)
    assert (ledger.step, ledger.samples, ledger.tokens) == (STEPS, STEPS * BATCH, STEPS * TOKENS)
    assert ledger.is_saved and ledger.skipped_steps == 0
    ends = [PHASES[0] * BATCH, PHASES[1] * BATCH, STEPS * BATCH]
    for number, (begin, end) in enumerate(zip([0, *ends[:2]], ends, strict=True)):
        counts = Counter(Path(prefix).parent.name for prefix, _ in expected[begin:end])
        entries = [entry for entry in ledger.entries if entry.phase == number]
        assert {entry.data_set: entry.samples for entry in entries} == counts
        assert sum(entry.share or 0 for entry in entries) == pytest.approx(1)
        assert all(abs((entry.share or 0) - entry.share_asked) * (end - begin) <= 2 for entry in entries)
        assert {entry.planned_samples for entry in entries} == {0}
    once = sum((shard.tokens - 1) // LENGTH for shard in read_manifest(sets["b"]).shards)
    assert ledger.epochs["b"] == sum(Path(prefix).parent == sets["b"] for prefix, _ in expected) / once
    saves = [
        event for attempt in interrupted.attempts() for _, event in read_events(attempt.events)
        if isinstance(event, SaveEvent)
    ]  # fmt: skip
    request = request_of(read_plan(interrupted.plan))
    assert len({save.data_fingerprint for save in saves}) == 3
    assert all(save.data_fingerprint == request.fingerprint_at(save.consumed_samples) for save in saves)


# Resume and branch


@pytest.fixture(scope="module")
def stopped(trainer: Trainer, sets: dict[str, Path]) -> RunDirectory:
    """A run that was asked to stop after some of 40 steps, with a checkpoint at each fourth."""
    run, plan = trainer.make_run(*words(sets), "checkpoint.interval_steps=4", "checkpoint.keep_last=9", steps=40)
    attempt = stop_after(trainer, run, plan, 13)
    ended = {"cause": "stopped", "action": "stop", "message": "", "why": "", "ended": time.time(), "submissions": 0}
    write_json(attempt.outcome, ended)
    return run


def other_fields(sets: dict[str, Path], *phases: str) -> list[str]:
    return [words(sets, *phases)[-1]]


def test_a_phase_from_what_is_read_on_is_taken_up_and_read_as_planned(
    trainer: Trainer, stopped: RunDirectory, sets: dict[str, Path]
) -> None:
    newest = complete_checkpoints(stopped)[-1].step
    prepared = prepare_resume(stopped, other_fields(sets, phase(newest, [sets["c"]])))
    assert [change.field for change in prepared.changes] == ["data.phases"]
    before = data_ledger(stopped)
    assert (before.step, {entry.phase for entry in before.entries}) == (newest, {0})
    assert sum(entry.samples for entry in before.entries) == newest * BATCH

    run, _ = trainer.make_run(*words(sets), steps=1)  # goes on from the other's checkpoint
    branch = BranchPoint(run=stopped, checkpoint=complete_checkpoints(stopped)[-1])
    plan = make_plan(dataclasses.replace(prepared.plan.settings, name=run.name))
    manifests = [read_manifest(sets[name]) for name in ("a", "b")]
    check_branch(plan, branch, manifests)
    adopt(branch.checkpoint, run)
    write_plan(run.launched_plan, plan)
    attempt, processes = trainer.start(run, plan)
    assert set(trainer.wait(run, attempt, processes)) == {0}, attempt.rank_log(0).read_text()[-2000:]
    after = data_ledger(run)
    assert [(entry.data_set, entry.samples) for entry in after.entries if entry.phase == 1] == [
        ("c", (40 - newest) * BATCH)
    ]
    assert [entry for entry in after.entries if entry.phase == 0] == [
        dataclasses.replace(entry, planned_samples=0) for entry in before.entries
    ]


def test_what_would_change_the_past_is_refused_with_what_to_do(stopped: RunDirectory, sets: dict[str, Path]) -> None:
    newest = complete_checkpoints(stopped)[-1]
    consumed = newest.step * TOKENS
    for asked, said in (
        (
            other_fields(sets, phase(4, [sets["c"]])),
            rf"data.phases\[0\] would begin after 512 tokens, and the checkpoint has read {consumed} without it; "
            rf"let it begin at from_tokens={consumed} or later, or go on from a checkpoint of step 4 or before: "
            rf"`orchestrate launch --from {stopped.name}@STEP",
        ),
        (
            ["data.weights=[1,2]"],
            rf"data.train with data.weights is another than the {consumed} tokens .* from_tokens={consumed} or more",
        ),
        ([f"data.train=[{sets['a']},{sets['c']}]"], "data.train with data.weights is another"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare_resume(stopped, asked)


def test_from_an_older_checkpoint_an_earlier_phase_can_begin(stopped: RunDirectory, sets: dict[str, Path]) -> None:
    settings = read_plan(stopped.plan).settings
    manifests = [read_manifest(sets[name]) for name in ("a", "b")]
    plan = make_plan(recompose(settings, [*other_fields(sets, phase(4, [sets["c"]])), "name=earlier"]))
    older, newer = (found for found in complete_checkpoints(stopped) if found.step in (4, 8))
    check_branch(plan, BranchPoint(run=stopped, checkpoint=older), manifests)
    with pytest.raises(ConfigError, match="would begin after 512 tokens"):
        check_branch(plan, BranchPoint(run=stopped, checkpoint=newer), manifests)


def test_ranks_refuse_a_plan_with_another_history(
    trainer: Trainer, stopped: RunDirectory, sets: dict[str, Path]
) -> None:
    settings = read_plan(stopped.plan).settings
    plan = make_plan(recompose(settings, other_fields(sets, phase(4, [sets["c"]]))))
    attempt, processes = trainer.start(stopped, plan)
    codes = [process.wait(timeout=120) for process in processes._processes.values()]
    try:
        assert set(codes) == {exit_codes.BAD_CHECKPOINT}, attempt.rank_log(0).read_text()[-2000:]
        assert "samples are those of data" in attempt.rank_log(0).read_text()
    finally:
        shutil.rmtree(attempt.path)
