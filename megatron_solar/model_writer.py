"""Write Hugging Face folders of Llama-like models, one tensor at a time.

Shards are laid out in advance from the shape, so memory holds the tensor at hand and not the model. The
folder appears whole or not at all.

The safetensors format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_solar.model_config import config_of
from megatron_solar.model_folder import TEMPLATE_FOLDER, expected_tensors
from megatron_solar.weight_files import DTYPES, INDEX_FILE, SINGLE_FILE, require_finite
from orchestrator.errors import ModelFolderError
from orchestrator.files import new_folder, sha256_of, write_json
from orchestrator.model_shape import TransformerShape
from orchestrator.units import format_bytes

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """SHA-256 of what was written, in hexadecimal.

    Attributes:
        tensors: of each tensor's bytes, by its name; the same in whatever shard it lies.
        files: of each file, by its path in the folder.
    """

    tensors: Mapping[str, str]
    files: Mapping[str, str]


def write_model_folder(
    output: Path,
    shape: TransformerShape,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    config_extra: Mapping[str, Any] | None = None,
    tokenizer_files: Sequence[Path] = (),
    extra_files: Mapping[str, str | bytes] | None = None,
    describe: Callable[[Checksums], Mapping[str, str]] | None = None,
    known_sum: Callable[[str], str | None] = lambda name: None,
    shard_bytes: int = SHARD_BYTES,
) -> Checksums:
    """Write a folder that transformers 4 and 5 load, or leave nothing.

    Tensors are cast to `dtype` and come best in the order of `expected_tensors`; one that comes early
    is held until its turn.

    Args:
        config_extra: keys of config.json beyond the shape, such as the ids of special tokens.
        extra_files: content of more files by name; they go before those of the same name written here.
        known_sum: a tensor's checksum where the caller has it already, asked for when the tensor was taken.
        describe: called once all other files are written; returns the text of files that tell of them.

    Raises:
        ModelFolderError: a tensor is missing, unknown, misshapen or not finite, or the disk is too small.
        OrchestrateError: `output` exists already.
    """
    shards = _plan_shards(shape, dtype, shard_bytes)
    with new_folder(output) as folder:
        _check_space(folder, sum(shard.total_bytes for shard in shards))
        tensor_sums, file_sums = _write_shards(folder, shards, shape, tensors, dtype, known_sum)
        config = config_of(shape, dtype, config_extra or {})
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", _generation_config_of(config))
        if len(shards) > 1:
            write_json(folder / INDEX_FILE, _index_of(shards, shape))
        for source in tokenizer_files:
            target = folder / (TEMPLATE_FOLDER if source.parent.name == TEMPLATE_FOLDER else "") / source.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        _write_texts(folder, extra_files or {})
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name not in file_sums:
                file_sums[str(file.relative_to(folder))] = sha256_of(file)
        checksums = Checksums(tensors=tensor_sums, files=file_sums)
        if describe is not None:
            _write_texts(folder, describe(checksums))
    return checksums


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """One file to write: its name, its tensors in order with their bytes, its header."""

    name: str
    tensors: Mapping[str, int]
    header: bytes

    @property
    def total_bytes(self) -> int:
        return len(self.header) + sum(self.tensors.values())


def _plan_shards(shape: TransformerShape, dtype: torch.dtype, shard_bytes: int) -> list[_Shard]:
    """Fill shards in order, each up to `shard_bytes` or with one larger tensor."""
    expected = expected_tensors(shape)
    groups: list[dict[str, int]] = [{}]
    for name, size in expected.items():
        tensor_bytes = math.prod(size) * dtype.itemsize
        if groups[-1] and sum(groups[-1].values()) + tensor_bytes > shard_bytes:
            groups.append({})
        groups[-1][name] = tensor_bytes
    if len(groups) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    return [
        _Shard(name=name, tensors=group, header=_header_of(group, expected, dtype))
        for name, group in zip(names, groups, strict=True)
    ]


def _header_of(group: Mapping[str, int], expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor_bytes in group.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": expected[name],
            "data_offsets": [offset, offset + tensor_bytes],
        }
        offset += tensor_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shards(
    folder: Path,
    shards: Sequence[_Shard],
    shape: TransformerShape,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    known_sum: Callable[[str], str | None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Write all shards; return the checksums of tensors and of files, these computed beside the writing."""
    ordered = _in_order(tensors, expected_tensors(shape))
    tensor_sums: dict[str, str] = {}
    file_sums: dict[str, str] = {}
    for shard in shards:
        with (folder / shard.name).open("wb") as stream, ThreadPoolExecutor(1) as hashing:
            whole = hashlib.sha256(shard.header)
            stream.write(shard.header)
            for wanted in shard.tensors:
                data = _bytes_of(wanted, next(ordered), dtype)
                hashed = hashing.submit(whole.update, data)
                stream.write(data)
                tensor_sums[wanted] = known_sum(wanted) or hashlib.sha256(data).hexdigest()
                hashed.result()
            file_sums[shard.name] = whole.hexdigest()
    next(ordered, None)  # a tensor too many is found here
    return tensor_sums, file_sums


def _in_order(
    tensors: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[torch.Tensor]:
    """Yield the expected tensors in their order, holding those that come early."""
    source = iter(tensors)
    early: dict[str, torch.Tensor] = {}
    done: set[str] = set()
    for wanted in expected:
        while wanted not in early:
            name, tensor = next(source, (None, None))
            if name is None or tensor is None:
                missing = [left for left in expected if left not in done and left not in early]
                raise ModelFolderError(
                    f"{len(missing)} of {len(expected)} tensors were not given, the first {missing[0]}"
                )
            _check_given(name, tensor, expected, done | early.keys())
            early[name] = tensor
        done.add(wanted)
        yield early.pop(wanted)
    for name, tensor in source:
        _check_given(name, tensor, expected, done)


def _check_given(
    name: str, tensor: torch.Tensor, expected: Mapping[str, tuple[int, ...]], given: Iterable[str]
) -> None:
    if name not in expected:
        raise ModelFolderError(f"{name} was given, which is no tensor of this shape")
    if name in given:
        raise ModelFolderError(f"{name} was given twice")
    if tuple(tensor.shape) != expected[name]:
        raise ModelFolderError(f"{name} should have shape {expected[name]}, found {tuple(tensor.shape)}")


def _bytes_of(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """Return the tensor's bytes in the wanted type, without a copy where it has it already.

    Raises:
        ModelFolderError: a value is NaN or infinite, also if only since the cast.
    """
    cast = tensor.detach().to("cpu", dtype).contiguous()
    require_finite(name, cast)
    return cast.view(-1).view(torch.uint8).numpy().data


def _write_texts(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _generation_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True} | {key: config[key] for key in ids if config.get(key) is not None}


def _index_of(shards: Sequence[_Shard], shape: TransformerShape) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": shape.parameters(),
            "total_size": sum(sum(shard.tensors.values()) for shard in shards),
        },
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ModelFolderError(
            f"{folder.parent} has {format_bytes(free)} free, the weights need {format_bytes(needed_bytes)}; "
            "free some space or name another output"
        )
