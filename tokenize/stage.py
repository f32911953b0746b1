"""Text in, data set folders out: find files, cut them into units, have the units worked on, account for all, publish.

What is under way lies in `OUTPUT.partial` (work_folder.py) and survives any kill; the same command goes on with it.
The units follow from the inputs alone, and each gives the same bytes whoever works on it and however often it was
interrupted, so the data set does as well. A data set folder appears whole or not at all.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.errors import ConfigError, DataError, OrchestrateError
from orchestrator.files import sha256_of
from orchestrator.tokenize.begin import absolute_files, begin, coordinator_lock
from orchestrator.tokenize.blocks import BLOCK_BYTES
from orchestrator.tokenize.concatenate import SHARD_TOKENS
from orchestrator.tokenize.engine import EngineChoice
from orchestrator.tokenize.engines import load_engine
from orchestrator.tokenize.inputs import find_files
from orchestrator.tokenize.manifest import DatasetManifest
from orchestrator.tokenize.publish import complete, move_out
from orchestrator.tokenize.shard import token_type
from orchestrator.tokenize.source_errors import printable
from orchestrator.tokenize.tally import add_up, refuse_nothing, refuse_too_many_bad
from orchestrator.tokenize.unit_work import COMMIT_SECONDS
from orchestrator.tokenize.units import choose_unit_bytes
from orchestrator.tokenize.watch import Watch
from orchestrator.tokenize.work_folder import UnitRecord, WorkFolder, WorkPlan
from orchestrator.tokenize.workers import processors, work_on
from orchestrator.tokenize.write_errors import explain

MAX_BAD = 0.01

CarryOut = Callable[[WorkFolder, Callable[[], None]], None]
"""Has all units of a folder worked on, by whom it likes; calls the function about twice a second meanwhile."""


def tokenize_corpus(
    inputs: Sequence[Path],
    tokenizer: Path,
    output: Path,
    *,
    text_key: str = "text",
    validation_output: Path | None = None,
    validation_every: int | None = None,
    max_bad: float = MAX_BAD,
    workers: int | None = None,
    engine: EngineChoice = "auto",
    unit_bytes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    commit_seconds: float = COMMIT_SECONDS,
    block_bytes: int = BLOCK_BYTES,
    carry_out: CarryOut | None = None,
) -> DatasetManifest:
    """Tokenize text into a new data set folder, or go on with one that is half done, and return its manifest.

    Args:
        inputs: files, folders and glob patterns.
        tokenizer: a SentencePiece model or tokenizer.json, or a folder that has one.
        output: the folder to make; what is under way lies in `output`.partial.
        text_key: key of the text in JSON lines, and column in parquet.
        validation_output: a second folder, for held-out documents; by default `output`-validation.
        validation_every: one document in so many is held out, by the checksum of its text; None: none.
        max_bad: share of the records that may be quarantined.
        workers: processes; by default one for each processor.
        engine: what turns text into ids.
        unit_bytes: text of a unit of work, about; by default by the size of the corpus.
        shard_tokens: a shard that has so many tokens is closed and another begun.
        progress: show a bar on stderr.
        commit_seconds: how often each unit is put safely on disk.
        block_bytes: text that is encoded at once.
        carry_out: who works on the units instead of `workers` processes of this machine.

    Raises:
        ConfigError: the request contradicts itself.
        DataError: no text, no tokenizer, a file that cannot be read, too many bad records, or what is under way was
            begun with other settings.
        DiskFullError: no room; what is done is kept.
        OrchestrateError: an output folder exists already, or another process works on it.
    """
    validation_output = choose_validation_output(output, validation_output, validation_every)
    _check_numbers(max_bad, workers, unit_bytes, shard_tokens)
    folder = WorkFolder(output.absolute().with_name(f"{output.name}.partial"))
    outputs = [output] if validation_output is None else [output, validation_output]
    _refuse_taken(folder, outputs)
    found = find_files(inputs, text_key=text_key, leave_out=[folder.path, *outputs])
    loaded, tokenizer_path = load_engine(tokenizer, engine)
    files = absolute_files(found)
    wanted = WorkPlan(
        tokenizer_file="tokenizer.json" if tokenizer_path.suffix == ".json" else "tokenizer.model",
        tokenizer_sha256=sha256_of(tokenizer_path),
        engine_choice=engine,
        engine=loaded.name,
        vocab_size=loaded.vocab_size,
        end_of_document=loaded.end_of_document,
        begin_of_document=loaded.begin_of_document,
        text_key=text_key,
        validation_every=validation_every,
        validation_output=None if validation_output is None else str(validation_output.absolute()),
        shard_tokens=shard_tokens,
        unit_bytes=unit_bytes or choose_unit_bytes(files),
        inputs=tuple(printable(path) for path in inputs),
        files=len(files),
        skipped_files=found.skipped,
        units=0,
        dtype=token_type(loaded.vocab_size),
    )

    def on_this_machine(folder: WorkFolder, look: Callable[[], None]) -> None:
        units, processes = range(folder.read_plan().units), workers or processors()
        work_on(folder.path, units, processes, commit_seconds, block_bytes=block_bytes, engine=loaded, look=look)

    try:
        with coordinator_lock(folder) as lock:
            _refuse_taken(folder, outputs)
            plan = begin(folder, wanted, files, tokenizer_path, unit_bytes_given=unit_bytes is not None)
            if not folder.published.exists():
                source_bytes = sum(its.unit.source_bytes for its in folder.read_units())
                watch = Watch(folder, lock, source_bytes=source_bytes, max_bad=max_bad, bar=progress)
                with watch.shown():
                    (carry_out or on_this_machine)(folder, watch.look)
                    records = watch.finish()
                _check_done(folder, plan, records, max_bad)
                complete(folder, plan, records, output, max_bad=max_bad)
            return move_out(folder, plan, output)
    except OSError as error:
        raise explain(error, f"cannot write the data set {output}", folder.path) from error


def choose_validation_output(output: Path, validation_output: Path | None, every: int | None) -> Path | None:
    """Return the folder for held-out documents, or None where none are held out.

    Raises:
        ConfigError: a folder without a share, a share that leaves nothing, or folders in each other.
    """
    if every is None:
        if validation_output is not None:
            raise ConfigError(
                f"validation output {validation_output} was given, but not how many documents go there; "
                "add --validation-every 20 for one in twenty"
            )
        return None
    if every < 2:
        raise ConfigError(f"--validation-every {every} leaves nothing to train on; use 2 or more")
    chosen = validation_output or output.with_name(f"{output.name}-validation")
    first, second = output.absolute(), chosen.absolute()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise ConfigError(f"output {output} and validation output {chosen} should be two separate folders")
    return chosen


def _check_numbers(max_bad: float, workers: int | None, unit_bytes: int | None, shard_tokens: int) -> None:
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"--max-bad {max_bad:g} should be a share of the records, from 0 to 1")
    for name, value in (("--workers", workers), ("unit_bytes", unit_bytes), ("shard_tokens", shard_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} should be 1 or more")


def _refuse_taken(folder: WorkFolder, outputs: Sequence[Path]) -> None:
    """Refuse names that are taken, but for folders that were moved there by this very work before it was killed."""
    taken = [output for output in outputs if output.exists()]
    if taken and not folder.published.exists():
        raise OrchestrateError(f"output {taken[0]} exists already; name another or remove it")


def _check_done(folder: WorkFolder, plan: WorkPlan, records: Sequence[UnitRecord], max_bad: float) -> None:
    """See that all units are done and that what they are together can be used."""
    tally = add_up(records)
    if tally.units_done != plan.units:
        raise OrchestrateError(
            f"{plan.units - tally.units_done} of {plan.units} units are not done, though whoever worked on them says "
            f"so; what is done is kept in {folder.path}, and the same command goes on"
        )
    try:
        refuse_nothing(tally, plan.validation_every)
    except DataError:
        shutil.rmtree(folder.path)
        raise
    refuse_too_many_bad(tally, max_bad, at_end=True)
