"""Open the weight files of a Hugging Face folder, mapped into memory: pages are read when a tensor is touched.

Safetensors, or PyTorch's `.bin` read with `weights_only`, which executes nothing that a file may hold; safetensors
count where a folder has both.

The safetensors format: https://github.com/huggingface/safetensors#format
"""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from orchestrator.errors import ModelFolderError, OrchestrateError
from orchestrator.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LAYOUTS = (
    (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
"""A file alone, an index of shards, and shards without one: looked for in this order, as transformers does."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that are read, by their names in safetensors."""


class WeightFile(Protocol):
    """An open file of named tensors."""

    def names(self) -> Sequence[str]:
        """Return the names of its tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the size of a tensor, which is not read."""

    def dtype(self, name: str) -> str:
        """Return the type of a tensor, by its name in safetensors where it is one of `DTYPES`."""

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, mapped from the file."""


def open_weight_files(path: Path) -> dict[str, WeightFile]:
    """Open every weight file of a folder; return for each tensor's name the file that has it.

    Raises:
        ModelFolderError: there are none, or they are missing, truncated or of another format; all at once.
    """
    found: dict[str, WeightFile] = {}
    problems: list[str] = []
    for file, index in _weight_files(path):
        if not file.is_file():
            problems.append(f"shard {file.name} is missing; {index} lists it")
            continue
        try:
            opened = _open(file)
        except ModelFolderError as error:
            problems.append(str(error))
            continue
        for name in opened.names():
            if name in found:
                problems.append(f"{name} is in {file.name} and in another shard")
            found[name] = opened
    if problems:
        raise ModelFolderError(f"weights of {path} cannot be read", problems)
    return found


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with values that are no numbers.

    Raises:
        ModelFolderError: a value is NaN or infinite.
    """
    # Both ends are NaN where any value is; this is 90 times as fast as isfinite on bf16.
    if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelFolderError(
            f"{name} has {count} of {tensor.numel()} values NaN or infinite in {tensor.dtype}; the weights are damaged"
        )


def _weight_files(path: Path) -> list[tuple[Path, str]]:
    """Return the weight files, each with the name of the index that lists it."""
    for single, index, pattern in _LAYOUTS:
        if (path / single).is_file():
            return [(path / single, "")]
        if (path / index).is_file():
            try:
                names = sorted(set(read_json(path / index)["weight_map"].values()))
                return [(path / name, index) for name in names]
            except (OrchestrateError, KeyError, TypeError, AttributeError) as error:
                raise ModelFolderError(f"{path / index} should map tensors to files: {error!r}") from error
        if shards := sorted(path.glob(pattern)):
            return [(shard, "") for shard in shards]
    raise ModelFolderError(
        f"{path} has no weights: {SINGLE_FILE} or {INDEX_FILE} with its shards, or the same as pytorch_model.bin"
    )


def _open(file: Path) -> WeightFile:
    kinds: dict[str, Callable[[Path], WeightFile]] = {".safetensors": _Safetensors, ".bin": _Pickled}
    return kinds.get(file.suffix, _Safetensors)(file)


class _Safetensors:
    def __init__(self, file: Path) -> None:
        try:
            self._file: Any = safetensors.safe_open(file, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelFolderError(
                f"{file.name} is truncated or no safetensors file: {error}; fetch it again"
            ) from error

    def names(self) -> Sequence[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return str(self._file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _Pickled:
    def __init__(self, file: Path) -> None:
        remedy = "fetch it again, or save it once as safetensors"
        with file.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"  # as torch writes since 1.6; what it wrote before cannot be mapped
        if not is_zip:
            raise ModelFolderError(f"{file.name} is truncated or no file of torch.save since torch 1.6; {remedy}")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ModelFolderError(
                f"{file.name} is damaged, or holds more than tensors, which is never executed: "
                f"{_first_line(error)}; fetch the model's safetensors"
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise ModelFolderError(
                f"{file.name} is truncated or no file of torch.save: {_first_line(error)}; {remedy}"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise ModelFolderError(f"{file.name} should hold tensors by their names; save the model's state_dict alone")
        self._tensors: dict[str, Tensor] = content

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        dtype = self._tensors[name].dtype
        return next((known for known, same in DTYPES.items() if same == dtype), str(dtype))

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
