"""The whole path on this machine: nothing here but calls of what the commands call, with conf/ recipes.

Text, data sets, a base trained from new weights, SOLAR's up-scaling, two tensor-parallel ranks under
the supervisor, an interruption by what a time limit sends, a second attempt, an export compared with
`transformers`.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.checkpoints import choose_checkpoint
from orchestrator.config import compose
from orchestrator.errors import DataError, OrchestrateError
from orchestrator.events import Event, read_events
from orchestrator.files import write_json
from orchestrator.follow import follow
from orchestrator.launch import launch
from orchestrator.pictures import Curve, draw_losses
from orchestrator.plan import make_plan
from orchestrator.progress import progress_bar
from orchestrator.reconcile import State
from orchestrator.run_directory import RunDirectory
from orchestrator.slurm.scheduler import warn_of_time_limit
from orchestrator.status import RunStatus
from orchestrator.tokenize.stage import tokenize_corpus
from orchestrator.values import to_plain
from orchestrator.verify import verify_export

VALIDATION_EVERY = 20
DROP = 2
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSummary:
    """What the demo did, in numbers and places."""

    base_run: str
    run: str
    attempts: int
    interrupted_after_step: int
    tokens: int
    tokens_per_second: float
    held_out_loss_base: float
    held_out_loss_upscaled: float
    held_out_loss_trained: float
    largest_logit_difference: float
    generated: str
    seconds: float
    checkpoint: str
    exported_model: str
    loss_picture: str


def run_demo(folder: Path, text: Path | None, say: Callable[[str], None]) -> DemoSummary:
    """Run the whole path into a new folder; the runs go where all runs go.

    Args:
        text: a file or folder of text; the standard library's sources by default.
        say: told the title of each step.

    Raises:
        OrchestrateError: whatever a step's command would say.
    """
    started = time.monotonic()
    vocabulary = find_vocabulary()
    if folder.exists():
        raise OrchestrateError(f"the demo's folder {folder} exists already; name another with --output")
    folder.mkdir(parents=True)
    say(
        "1/8 text: the Python standard library's sources and their documentation"
        if text is None
        else f"1/8 text: {text}"
    )
    corpus = text if text is not None else write_standard_library(folder / "text.jsonl")

    say("2/8 tokenize: a 32k SentencePiece vocabulary into Megatron's .bin/.idx, one document in 20 held out")
    train, validation = folder / "data" / "train", folder / "data" / "validation"
    tokenize_corpus([corpus], vocabulary, train, validation_output=validation, validation_every=VALIDATION_EVERY)
    data = [f"data.train={train}", f"data.validation={validation}"]

    say("3/8 base: 8 layers trained from new weights, one rank, then exported")
    base_run = launch(make_plan(compose("demo-base", [f"name={folder.name}-base", *data])), "orchestrate demo")
    base_status = follow(base_run)
    base = folder / "base"
    _export(base_run, base)

    say("4/8 upscale: SOLAR's rule, 8 to 12 layers")
    upscaled = folder / "upscaled"
    _upscale(base, upscaled)

    say("5/8 plan and launch: 12 layers on 2 ranks with tensor parallelism, through Submitit")
    plan = make_plan(compose("demo", [f"name={folder.name}", f"base={upscaled}", *data]))
    run = launch(plan, "orchestrate demo")

    say("6/8 interrupted half-way by what a time limit sends; it saves, leaves, and goes on as attempt 2")
    status = follow(run, _interrupt_once(run))
    outcome = run.attempt(1).read_outcome()
    if status.state != State.FINISHED or status.attempts < 2 or outcome is None:
        raise OrchestrateError(f"run {run.name} should have finished in 2 attempts, found {status.state} after "
                               f"{status.attempts}; see `orchestrate logs {run.name}`")  # fmt: skip

    say("7/8 export: to Hugging Face, its logits compared with the trained Megatron model's")
    exported = folder / "exported"
    _export(run, exported)
    checkpoint = choose_checkpoint(run)
    verified = verify_export(run, checkpoint, exported)

    say("8/8 summary")
    picture = folder / "loss.png"
    draw_losses(
        picture,
        f"{folder.name}: base, and the up-scaled model trained on",
        [
            Curve(name="base, 8 layers", attempts=_events(base_run)),
            Curve(name="up-scaled, 12 layers", attempts=_events(run)),
        ],
    )
    losses = (base_status.validation_loss, status.first_validation_loss, status.validation_loss)
    if None in losses or status.tokens_per_second is None:
        raise OrchestrateError(f"run {run.name} told of no held-out loss")
    summary = DemoSummary(
        base_run=base_run.name,
        run=run.name,
        attempts=status.attempts,
        interrupted_after_step=int(outcome["last_step"]),
        tokens=status.consumed_tokens,
        tokens_per_second=status.tokens_per_second,
        held_out_loss_base=losses[0] or 0.0,
        held_out_loss_upscaled=losses[1] or 0.0,
        held_out_loss_trained=losses[2] or 0.0,
        largest_logit_difference=verified.largest_logit_difference,
        generated=verified.generated,
        seconds=time.monotonic() - started,
        checkpoint=str(checkpoint.path),
        exported_model=str(exported),
        loss_picture=str(picture),
    )
    write_json(folder / "summary.json", to_plain(summary))
    return summary


def find_vocabulary() -> Path:
    """Return the 32k SentencePiece model that the package mistral-common carries.

    Raises:
        OrchestrateError: the package is not installed.
    """
    try:
        import mistral_common
    except ImportError as error:
        raise OrchestrateError("the demo needs a vocabulary and a reader of the export; "
                               "`pip install 'orchestrate[demo]'`") from error  # fmt: skip
    return next(Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1"))


def write_standard_library(path: Path) -> Path:
    """Write the standard library's own sources as JSON lines, a file a document."""
    library = Path(os.__file__).parent
    with path.open("w", encoding="utf-8") as stream:
        for source in _sources(library):
            text = source.read_text(encoding="utf-8", errors="strict")
            stream.write(json.dumps({"text": text, "source": str(source.relative_to(library))}) + "\n")
    if path.stat().st_size == 0:
        raise DataError(f"no Python sources in {library}; give your own text with --text PATH")
    return path


def _sources(library: Path) -> Iterator[Path]:
    for source in sorted(library.rglob("*.py")):
        if not any(part in LEFT_OUT for part in source.relative_to(library).parts):
            yield source


def _export(run: RunDirectory, output: Path) -> None:
    from megatron_solar.export import export
    from orchestrator.plan import read_plan

    with progress_bar("export", unit="parameters") as show:
        export(choose_checkpoint(run), read_plan(run.plan), output, run_name=run.name, progress=show)


def _upscale(base: Path, output: Path) -> None:
    from megatron_solar.upscale import upscale

    with progress_bar("upscale", unit="bytes") as show:
        upscale(base, output, drop=DROP, progress=show)


def _interrupt_once(run: RunDirectory) -> Callable[[RunStatus], None]:
    """Return what sends the time limit's signal once, as soon as half of the steps are done."""
    is_sent = False

    def look(status: RunStatus) -> None:
        nonlocal is_sent
        if not is_sent and status.state == State.RUNNING and status.step * 2 >= status.total_steps:
            warn_of_time_limit(run)
            is_sent = True

    return look


def _events(run: RunDirectory) -> list[list[Event]]:
    return [[event for _, event in read_events(attempt.events)] for attempt in run.attempts()]
