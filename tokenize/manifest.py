"""What a data set folder is: `manifest.json`, the shards it lists, and the tokenizer they were made with.

    DIR/
      manifest.json          written last; a folder without it is no data set
      shard_00000.bin .idx   ... one pair for every `shards` entry, each written by one process
      tokenizer.model        the very file that made the ids; or tokenizer.json
      quarantine.jsonl       records that could not be read; only where there were any
      documents.svg          lengths of the documents

The fingerprint says which tokens these are: it is made from the tokenizer's and the shards'
checksums and the settings that chose the documents, and from no path, clock or engine, so the same
files tokenized elsewhere, by any number of processes, have the same one. Standard library only,
since the training workers read it.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

from orchestrator.errors import DataError, OrchestrateError
from orchestrator.files import read_json, sha256_of
from orchestrator.values import from_plain, to_plain

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
PICTURE = "documents.svg"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
"""Of a model's folder; a data set is made with one of them."""
FORMAT = 1

TokenType = Literal["uint16", "int32"]
TOKEN_BYTES: dict[TokenType, int] = {"uint16": 2, "int32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One pair of .bin and .idx files."""

    name: str
    """Path prefix inside the folder; the files are `name`.bin and `name`.idx."""
    documents: int
    tokens: int
    dtype: TokenType
    bin_bytes: int
    index_bytes: int
    bin_sha256: str
    index_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """A tokenized data set: what was read, what became of it, and how to check it.

    `documents_read == documents + held_out_documents + empty_documents + quarantined_documents`.
    """

    fingerprint: str
    """SHA-256 over tokenizer, shards and settings; a checkpoint remembers it."""
    tokenizer_file: str
    """Name inside the folder."""
    tokenizer_sha256: str
    engine: str
    """Library and version that made the ids."""
    vocab_size: int
    end_of_document: int
    """Token id after each document, put there by us and never by the text."""
    begin_of_document: int | None
    """Token id that the tokenizer has for it; not written into the data."""
    documents_read: int
    documents: int
    """Documents in the shards."""
    held_out_documents: int = 0
    """Documents that went to the validation data set instead."""
    empty_documents: int
    """Documents that gave no token; not in the shards."""
    quarantined_documents: int
    """Records that could not be read; in quarantine.jsonl, with where and why."""
    tokens: int
    """Ends of document included."""
    text_bytes: int
    """UTF-8 bytes of the documents in the shards."""
    part: Literal["all", "training", "validation"]
    validation_every: int | None
    """One document in so many is held out, those whose CRC-32 it divides; of the training and the validation part."""
    text_key: str
    """Key of the text in JSON lines."""
    inputs: tuple[str, ...]
    """As they were given."""
    files: int
    """Files read."""
    skipped_files: dict[str, int]
    """Files inside the inputs that were not read, counted by suffix."""
    source_bytes: int | None = None
    """All files that were read, on disk. None, as the next three, where an older version wrote the data set."""
    unit_bytes: int | None = None
    """Text in a unit of work, about; with the inputs it decides what is in which shard."""
    shard_tokens: int | None = None
    """Tokens at which a shard is closed and another begun."""
    max_bad: float | None = None
    """Share of the records that might have been quarantined."""
    created: str
    """UTC, ISO 8601."""
    shards: tuple[TokenShard, ...]
    format: int = FORMAT

    def shard_prefixes(self, folder: Path) -> tuple[str, ...]:
        """Return the absolute path prefixes of the shards, as megatron's GPTDataset wants them."""
        return tuple(str(folder.absolute() / shard.name) for shard in self.shards)


def fingerprint_of(manifest: DatasetManifest) -> str:
    """Compute the fingerprint from the fields that decide which tokens stand where."""
    decisive = {
        "format": manifest.format,
        "tokenizer": manifest.tokenizer_sha256,
        "end_of_document": manifest.end_of_document,
        "text_key": manifest.text_key,
        "part": manifest.part,
        "validation_every": manifest.validation_every,
        "shards": [[shard.bin_sha256, shard.index_sha256] for shard in manifest.shards],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> DatasetManifest:
    """Read a data set's manifest, and check that its files are there in their full sizes.

    Raises:
        DataError: the folder is no data set, is damaged, or was written by another version.
    """
    manifest = parse_manifest(folder)
    problems = file_problems(folder, manifest)
    if problems:
        raise DataError(f"the data set {folder} is damaged; copy it again or tokenize again:", problems)
    return manifest


def parse_manifest(folder: Path) -> DatasetManifest:
    """Read a data set's manifest alone.

    Raises:
        DataError: the folder is no data set, or its manifest is none of this version.
    """
    remedy = "write one with `orchestrate tokenize INPUT --tokenizer PATH --output DIR`"
    path = folder / MANIFEST
    if not path.is_file():
        found = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise DataError(f"{folder} should be a tokenized data set, but {found}; {remedy}")
    try:
        data = read_json(path)
    except OrchestrateError as error:
        raise DataError(str(error)) from error
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT:
        raise DataError(f"{path} should have format {FORMAT}, found {version!r}; tokenize again")
    problems: list[str] = []
    manifest = from_plain(DatasetManifest, data, "", problems)
    if manifest is None:
        # The remedy after the semicolon is one for recipes.
        raise DataError(f"{path} is damaged; tokenize again:", [text.split(";")[0] for text in problems])
    return manifest


def to_json(manifest: DatasetManifest) -> str:
    """Return the manifest as indented JSON."""
    return json.dumps(to_plain(manifest), indent=2, ensure_ascii=False)


def file_problems(folder: Path, manifest: DatasetManifest) -> list[str]:
    """Return which files of a data set are missing or of another size, and whether its manifest was changed."""
    found = []
    if manifest.fingerprint != fingerprint_of(manifest):
        found.append(f"{MANIFEST} was changed by hand: its fingerprint is of other contents")
    sizes = {f"{shard.name}.bin": shard.bin_bytes for shard in manifest.shards}
    sizes |= {f"{shard.name}.idx": shard.index_bytes for shard in manifest.shards}
    for name, expected in sizes.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected:
            found.append(f"{name} should have {expected} bytes, found {path.stat().st_size}")
    if not (folder / manifest.tokenizer_file).is_file():
        found.append(f"{manifest.tokenizer_file} is missing")
    return found


def tokenizers_of(model: Path) -> list[str]:
    """Return the SHA-256 of each tokenizer in a model's folder."""
    return [sha256_of(model / name) for name in TOKENIZER_FILES if (model / name).is_file()]
