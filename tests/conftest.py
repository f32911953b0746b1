"""What the tests share: a real vocabulary, a small real corpus, and one process that forks the ranks."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from orchestrator.checkpoint_keeper import CheckpointKeeper
from orchestrator.config import compose
from orchestrator.events import Event, StepEvent, ValidationEvent, read_events
from orchestrator.files import JsonLines
from orchestrator.launch import launch
from orchestrator.plan import TrainingPlan, make_plan, read_plan, write_plan
from orchestrator.run_directory import AttemptDirectory, RunDirectory, create_run
from orchestrator.slurm import sandbox
from orchestrator.slurm.ranks import Preload, Ranks, rank_environment, rank_words, start_ranks
from orchestrator.slurm.sandbox import Sandbox
from orchestrator.slurm.scheduler import local_process
from orchestrator.tokenize.stage import tokenize_corpus
from tests.launched import put_store

REPOSITORY = Path(__file__).parent.parent

# A Llama shape that a rank trains at 20 steps in about a second; the vocabulary is the real one.
SMALL = (
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.max_position_embeddings=64",
    "data.sequence_length=32",
    "layout.micro_batch_size=1",
    "layout.global_batch_size=4",
    "training.validation_samples=8",
    "training.validation_interval_steps=1000",
    "checkpoint.interval_steps=1000",
    "precision=fp32",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switches of single tests."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")
    parser.addoption("--whole-corpus", action="store_true", help="tests/test_native_corpus.py on all of its 230 MB")


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    """The 32k SentencePiece vocabulary of Mistral 7B v1."""
    return next(Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A folder with `train` and `validation`, tokenized from a part of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenize_corpus(
        [Path(os.__file__).parent / "email", Path(os.__file__).parent / "asyncio"],
        tokenizer,
        folder / "train",
        validation_output=folder / "validation",
        validation_every=10,
        progress=False,
    )
    return folder


class Trainer:
    """Makes run folders and trains them with real ranks, forked from one preloaded process."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self._folder = folder
        self._corpus = corpus
        self._count = 0
        self._preload: Preload | None = None

    def make_run(
        self, *overrides: str, steps: int = 20, recipe: str = "demo-base"
    ) -> tuple[RunDirectory, TrainingPlan]:
        """Make a run's folder with its plan; its code is this checkout."""
        self._count += 1
        settings = compose(
            recipe,
            [
                *SMALL,
                f"data.train={self._corpus / 'train'}",
                f"data.validation={self._corpus / 'validation'}",
                f"name=run-{self._count}",
                f"paths.runs={self._folder}",
                f"training.tokens={steps * 4 * 32}",
                *overrides,
            ],
        )
        run = create_run(self._folder, settings.name)
        run.code.symlink_to(REPOSITORY)
        plan = make_plan(settings)
        write_plan(run.launched_plan, plan)
        return run, plan

    def preload(self, run: RunDirectory, plan: TrainingPlan) -> Preload:
        """Return the process that forks ranks, started for the first run."""
        if self._preload is None:
            self._preload = Preload(run, plan)
        self._preload.wait_until_ready()
        return self._preload

    def start(self, run: RunDirectory, plan: TrainingPlan) -> tuple[AttemptDirectory, Ranks]:
        """Start an attempt's ranks."""
        preload = self.preload(run, plan)
        attempt = run.new_attempt()
        return attempt, start_ranks(run, attempt, plan, preload)

    def wait(self, run: RunDirectory, attempt: AttemptDirectory, ranks: Ranks) -> list[int]:
        """Wait for the ranks, mark their checkpoints, and return their exit codes."""
        codes = [process.wait(timeout=120) for process in ranks._processes.values()]
        self.keep(run, attempt)
        return codes

    def keep(self, run: RunDirectory, attempt: AttemptDirectory) -> None:
        """Mark what the ranks have put on disk, as the supervisor does."""
        notes = JsonLines(attempt.supervisor_events)
        CheckpointKeeper(run, attempt, read_plan(attempt.plan), notes).look()
        notes.close()

    def train(self, run: RunDirectory, plan: TrainingPlan) -> AttemptDirectory:
        """Run one attempt to its good end."""
        attempt, ranks = self.start(run, plan)
        codes = self.wait(run, attempt, ranks)
        assert set(codes) == {0}, attempt.rank_log(0).read_text()[-3000:]
        return attempt

    def found_by_ranks(self, run: RunDirectory, plan: TrainingPlan, module: str, seconds: float) -> list[Any]:
        """Run a module of the tests on every rank of a plan, and return what each saved as `found-RANK.pt`."""
        import torch  # takes seconds, which most test files need not wait for

        attempt = run.new_attempt()
        arguments = [str(run.path), str(attempt.number)]
        words = rank_words(run, plan, self.preload(run, plan), module, arguments)
        ranks = []
        for rank in range(plan.layout.world_size):
            with attempt.rank_log(rank).open("wb") as log:
                command = [*words, "--rank", str(rank)]
                ranks.append(
                    subprocess.Popen(command, env=rank_environment(run, plan), cwd=run.path, stdout=log, stderr=log)
                )
        try:
            codes = [rank.wait(timeout=seconds) for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert set(codes) == {0}, "\n".join(attempt.rank_log(n).read_text()[-2000:] for n in range(len(ranks)))
        return [torch.load(attempt.path / f"found-{number}.pt") for number in range(len(ranks))]

    def close(self) -> None:
        """End the preloaded process."""
        if self._preload is not None:
            self._preload.close()


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Trainer]:
    """The session's trainer."""
    made = Trainer(tmp_path_factory.mktemp("runs"), corpus)
    with contextlib.closing(made):
        yield made


def events_of(attempt: AttemptDirectory) -> list[Event]:
    """Return the events that rank 0 wrote."""
    return [event for _, event in read_events(attempt.events)]


def losses(*attempts: AttemptDirectory) -> list[float]:
    """Return the loss of each step over attempts."""
    return [event.loss for attempt in attempts for event in events_of(attempt) if isinstance(event, StepEvent)]


def validation_losses(attempt: AttemptDirectory) -> list[float]:
    """Return the held-out losses in their order."""
    return [event.loss for event in events_of(attempt) if isinstance(event, ValidationEvent)]


def relative_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the largest relative difference between two curves of the same length."""
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def start(tmp_path: Path, corpus: Path) -> Iterator[Callable[..., RunDirectory]]:
    """Launch runs, and end what a failing test has left."""
    made: list[RunDirectory] = []

    def start(*overrides: str, steps: int = 12, recipe: str = "demo-base") -> RunDirectory:
        settings = compose(
            recipe,
            [
                *SMALL,
                f"data.train={corpus / 'train'}",
                f"data.validation={corpus / 'validation'}",
                f"paths.runs={tmp_path / 'runs'}",
                f"name=run-{len(made)}",
                f"training.tokens={steps * 4 * 32}",
                *overrides,
            ],
        )
        put_store(Path(settings.paths.runs))
        run = launch(make_plan(settings), "a test")
        made.append(run)
        return run

    yield start
    for run in made:
        process = local_process(run)
        if process is not None:
            for child in process.children(recursive=True):
                child.kill()
            process.kill()


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount small file systems; needs root, as in CI."""
    mounted: list[Path] = []

    def mount(megabytes: int, inodes: int = 0) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        options = f"size={megabytes}m" + (f",nr_inodes={inodes}" if inodes else "")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        mounted.append(folder)
        return folder

    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def start_slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sandbox]]:
    """Start a Slurm with its commands pointed at it, as a person's shell would have them."""
    started: list[str] = []

    def start(**options: int) -> Sandbox:
        name = f"launch-{os.getpid()}-{len(started)}"
        slurm = sandbox.start(name, **options)
        started.append(name)
        monkeypatch.setenv("SLURM_CONF", str(slurm.slurm_conf))
        return slurm

    yield start
    for name in started:
        sandbox.stop(name, patience_seconds=2)  # a dead node's job would not end for long


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, so that runs and tracking store start empty."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


__all__ = ["REPOSITORY", "Trainer", "events_of", "losses", "relative_difference", "signal", "validation_losses"]
