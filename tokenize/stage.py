"""Text in, data set folder out: find, read, encode, write, and account for every document.

The effect around the parts of this folder. A data set folder appears whole or not at all; with
documents held out, both folders appear or neither. Memory is bounded by one batch of documents (or
by the largest document), whatever the size of the corpus.
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from orchestrator.errors import ConfigError, DataError
from orchestrator.files import JsonLines, new_folder, sha256_of, write_atomic
from orchestrator.tokenize.document_lengths import DocumentLengths
from orchestrator.tokenize.documents import BadRecord, Document, FoundFiles, find_files, read_documents
from orchestrator.tokenize.engine import Engine, load_engine
from orchestrator.tokenize.manifest import (
    MANIFEST,
    PICTURE,
    QUARANTINE,
    TOKENIZER,
    DatasetManifest,
    TokenShard,
    fingerprint_of,
    to_json,
)
from orchestrator.tokenize.shard import ShardWriter, token_type
from orchestrator.units import format_count, format_time

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024

# 2 GB of uint16. GPTDataset keeps document ids in int32, so a large corpus needs many shards.
SHARD_TOKENS = 1 << 30


def tokenize_corpus(
    inputs: Sequence[Path],
    tokenizer: Path,
    output: Path,
    *,
    text_key: str = "text",
    validation_output: Path | None = None,
    validation_every: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
) -> DatasetManifest:
    """Tokenize text into a new data set folder and return its manifest.

    Args:
        inputs: files, folders and glob patterns.
        tokenizer: a SentencePiece model, or a folder that has a `tokenizer.model`.
        output: the folder to make.
        text_key: key of the text in JSON lines.
        validation_output: a second folder, for held-out documents; by default `output`-validation.
        validation_every: of the documents that have text, each so-many-th is held out; None: none.
        shard_tokens: a shard that has so many tokens is closed and another begun.
        progress: show a bar on stderr.

    Raises:
        ConfigError: the request contradicts itself.
        DataError: no text, no tokenizer, a file that cannot be read, or no room; no folder is left.
        OrchestrateError: an output folder exists already.
    """
    validation_output = choose_validation_output(output, validation_output, validation_every)
    found = find_files(inputs)
    engine, tokenizer_path = load_engine(tokenizer)
    try:
        with contextlib.ExitStack() as stack:
            folder, validation_folder = stack.enter_context(_new_folders(output, validation_output))
            training = stack.enter_context(_DataSetWriter(folder, engine, shard_tokens))
            validation = None
            if validation_folder is not None:
                validation = stack.enter_context(_DataSetWriter(validation_folder, engine, shard_tokens))
            reading = stack.enter_context(contextlib.closing(_Reading(folder / QUARANTINE)))
            split = _Split(training, validation, validation_every)
            with _ProgressBar(found.size_bytes, progress) as bar:
                for batch in _batches(found, text_key, reading, bar):
                    _write(batch, engine, reading, split)
                    bar.show(reading, split.tokens)
            reading.close()
            _check_counts(reading, split)

            manifest = DatasetManifest(
                fingerprint="",
                tokenizer_file=TOKENIZER,
                tokenizer_sha256=sha256_of(tokenizer_path),
                engine=engine.name,
                vocab_size=engine.vocab_size,
                end_of_document=engine.end_of_document,
                begin_of_document=engine.begin_of_document,
                documents_read=reading.documents,
                documents=training.documents,
                held_out_documents=validation.documents if validation else 0,
                empty_documents=reading.empty,
                quarantined_documents=reading.quarantined,
                tokens=training.tokens,
                text_bytes=training.text_bytes,
                part="training" if validation else "all",
                validation_every=validation_every,
                text_key=text_key,
                inputs=tuple(_printable(path) for path in inputs),
                files=len(found.files),
                skipped_files=found.skipped,
                created=format_time(time.time()),
                shards=training.finish_shards(),
            )
            if validation is not None:
                held_out = dataclasses.replace(
                    manifest,
                    documents_read=validation.documents,
                    documents=validation.documents,
                    held_out_documents=0,
                    empty_documents=0,
                    quarantined_documents=0,
                    tokens=validation.tokens,
                    text_bytes=validation.text_bytes,
                    part="validation",
                    shards=validation.finish_shards(),
                )
                validation.complete(held_out, tokenizer_path, validation_output or output)
            return training.complete(manifest, tokenizer_path, output)
    except OSError as error:
        raise DataError(f"cannot write the data set {output}: {error}; nothing of it was kept") from error


def choose_validation_output(output: Path, validation_output: Path | None, every: int | None) -> Path | None:
    """Return the folder for held-out documents, or None where none are held out.

    Raises:
        ConfigError: a folder without a share, a share that leaves nothing, or folders in each other.
    """
    if every is None:
        if validation_output is not None:
            raise ConfigError(
                f"validation output {validation_output} was given, but not which documents go there; "
                "add --validation-every 20 for each twentieth"
            )
        return None
    if every < 2:
        raise ConfigError(f"--validation-every {every} leaves nothing to train on; use 2 or more")
    chosen = validation_output or output.with_name(f"{output.name}-validation")
    first, second = output.absolute(), chosen.absolute()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise ConfigError(f"output {output} and validation output {chosen} should be two separate folders")
    return chosen


@contextlib.contextmanager
def _new_folders(output: Path, validation_output: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """Yield temporary folders that become both outputs, or none of them."""
    if validation_output is None:
        with new_folder(output) as folder:
            yield folder, None
        return
    validation_is_out = False
    try:
        with new_folder(output) as folder:
            with new_folder(validation_output) as validation_folder:
                yield folder, validation_folder
            validation_is_out = True
    except BaseException:
        if validation_is_out:
            shutil.rmtree(validation_output, ignore_errors=True)
        raise


class _DataSetWriter:
    """The shards and files of one data set folder, and what went into them."""

    def __init__(self, folder: Path, engine: Engine, shard_tokens: int) -> None:
        self._folder = folder
        self._dtype = token_type(engine.vocab_size)
        self._end_of_document = engine.end_of_document
        self._shard_tokens = shard_tokens
        self._shards: list[TokenShard] = []
        self._open: ShardWriter | None = None
        self._lengths = DocumentLengths()
        self.documents = 0
        self.tokens = 0
        self.text_bytes = 0

    def __enter__(self) -> "_DataSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.close()

    def add(self, document: Document, ids: Sequence[int]) -> None:
        """Append a document and its end."""
        if self._open is None:
            self._open = ShardWriter(self._folder, f"shard_{len(self._shards):05d}", self._dtype)
        length = self._open.add_document([*ids, self._end_of_document])
        self._lengths.add(length)
        self.documents += 1
        self.tokens += length
        self.text_bytes += document.text_bytes
        if self._open.tokens >= self._shard_tokens:
            self.finish_shards()

    def finish_shards(self) -> tuple[TokenShard, ...]:
        """Close the open shard, if any, and return all shards."""
        if self._open is not None:
            self._shards.append(self._open.finish())
            self._open = None
        return tuple(self._shards)

    def complete(self, manifest: DatasetManifest, tokenizer: Path, published_as: Path) -> DatasetManifest:
        """Add tokenizer, picture and, last, the manifest with its fingerprint."""
        shutil.copyfile(tokenizer, self._folder / TOKENIZER)
        self._lengths.draw(self._folder / PICTURE, published_as.name)
        manifest = dataclasses.replace(manifest, fingerprint=fingerprint_of(manifest))
        write_atomic(self._folder / MANIFEST, to_json(manifest) + "\n")
        return manifest


@dataclasses.dataclass(frozen=True)
class _Split:
    """Where a document goes: each `every`-th to validation, if there is one."""

    training: _DataSetWriter
    validation: _DataSetWriter | None
    every: int | None

    @property
    def documents(self) -> int:
        """Documents written to both."""
        return self.training.documents + (self.validation.documents if self.validation else 0)

    @property
    def tokens(self) -> int:
        """Tokens written to both."""
        return self.training.tokens + (self.validation.tokens if self.validation else 0)

    def add(self, document: Document, ids: Sequence[int]) -> None:
        """Write a document to its data set."""
        if self.validation and self.every and (self.documents + 1) % self.every == 0:
            self.validation.add(document, ids)
        else:
            self.training.add(document, ids)


class _Reading:
    """What became of the documents read; the bad ones are written to the quarantine file."""

    def __init__(self, quarantine: Path) -> None:
        self._path = quarantine
        self._quarantine: JsonLines | None = None
        self.documents = 0
        self.empty = 0
        self.quarantined = 0
        self.first_reasons: list[str] = []

    def quarantine(self, record: BadRecord) -> None:
        """Keep a bad record with where it was and why it is bad."""
        if self._quarantine is None:
            self._quarantine = JsonLines(self._path)
        file = _printable(record.file)
        self._quarantine.append(
            {
                "file": file,
                "offset": record.offset,
                "bytes": len(record.content),
                "reason": record.reason,
                "content": record.content.decode("utf-8", "backslashreplace"),
            }
        )
        self.quarantined += 1
        if len(self.first_reasons) < 3:
            self.first_reasons.append(f"{file}, byte {record.offset}: {record.reason}")

    def close(self) -> None:
        """Flush the quarantine file, where there is one."""
        if self._quarantine is not None:
            self._quarantine.close()
            self._quarantine = None


def _batches(found: FoundFiles, text_key: str, reading: _Reading, bar: "_ProgressBar") -> Iterator[list[Document]]:
    """Yield documents in groups worth a call of the engine; put bad records into quarantine."""
    batch: list[Document] = []
    batch_bytes = 0
    for file in found.files:
        for record in read_documents(file, text_key):
            reading.documents += 1
            bar.read_bytes += record.source_bytes
            if isinstance(record, BadRecord):
                reading.quarantine(record)
                continue
            batch.append(record)
            batch_bytes += record.text_bytes
            if batch_bytes >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, batch_bytes = [], 0
    yield batch


def _write(batch: Sequence[Document], engine: Engine, reading: _Reading, split: _Split) -> None:
    """Encode documents and write them; what gives no token is counted as empty."""
    encoded = engine.encode([document.text for document in batch])
    for document, ids in zip(batch, encoded, strict=True):
        if ids:
            split.add(document, ids)
        else:
            reading.empty += 1


def _check_counts(reading: _Reading, split: _Split) -> None:
    """Account for every document, and refuse a data set without one: megatron-core cannot open it."""
    if reading.documents != split.documents + reading.empty + reading.quarantined:
        raise AssertionError(
            f"{reading.documents} documents read, but {split.documents} written, {reading.empty} empty and "
            f"{reading.quarantined} quarantined; this is a fault of orchestrator.tokenize"
        )
    if not split.documents:
        raise DataError(
            f"no document has text: {reading.documents} read, {reading.empty} empty, "
            f"{reading.quarantined} unreadable; nothing was kept",
            reading.first_reasons,
        )
    if split.validation is not None and not split.validation.documents:
        raise DataError(
            f"holding out each {split.every}th document leaves none to validate on, since only "
            f"{split.documents} have text; use a smaller --validation-every"
        )


class _ProgressBar:
    """A bar on stderr with the speed so far; where stderr is no terminal, only its last state."""

    def __init__(self, total_bytes: int, is_shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("tokenize"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(stderr=True),
            disable=not is_shown,
        )
        self._total_bytes = total_bytes
        self._task = self._progress.add_task("", total=max(1, total_bytes), counts="")
        self._start = time.monotonic()
        self.read_bytes = 0

    def __enter__(self) -> "_ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            # Blank lines and byte order marks were read as well.
            self._progress.update(self._task, completed=max(1, self._total_bytes))
        self._progress.stop()

    def show(self, reading: _Reading, tokens: int) -> None:
        """Bring counts and speed up to date."""
        seconds = max(1e-3, time.monotonic() - self._start)
        counts = (
            f"{self.read_bytes / 1e6 / seconds:.1f} MB/s  {format_count(tokens / seconds)} tokens/s  "
            f"{format_count(reading.documents)} documents  {reading.quarantined} bad"
        )
        self._progress.update(self._task, completed=self.read_bytes, counts=counts)


def _printable(path: Path) -> str:
    """Return a path as text that UTF-8 can hold, whatever bytes its name is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
