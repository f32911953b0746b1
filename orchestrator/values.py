"""Frozen dataclasses from and to plain data (YAML and JSON), with every problem found at once.

Strict: an unknown key is a problem that names the nearest field, a value of another type is a
problem, and nothing is converted but an int where a float is wanted and 1e9 where an int is.
Standard library only, since the workers read their plan with it.
"""

import dataclasses
import difflib
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def to_plain(value: object) -> Any:
    """Return a value as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(kind: type[T], data: object, path: str, problems: list[str]) -> T | None:
    """Build a dataclass from plain data; append what is wrong to `problems`.

    Returns:
        the value, or None where a problem of its own or of a part was found.
    """
    before = len(problems)
    value = _convert(kind, data, path, problems)
    return value if len(problems) == before else None


def nearest(name: str, choices: typing.Iterable[str]) -> str:
    """Return 'did you mean X?' for the nearest of the choices, or a list of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(choices)}"


def unknown_key(where: str, kind: type, path: str = "") -> str:
    """Name the known key nearest to an unknown one, whole: `training.tokens`, not `tokens`.

    Args:
        where: the whole unknown key.
        kind: the dataclass that should hold it, which lies under `path`.
    """
    prefix = f"{path}." if path else ""
    known = [prefix + key for key in keys_of(kind)]
    last = where.rpartition(".")[2]
    same_name = [key for key in known if key.rpartition(".")[2] == last]
    if len(same_name) == 1:
        return f"unknown key {where}; did you mean {same_name[0]}?"
    section = where.rpartition(".")[0]
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    if not siblings:
        return f"unknown key {where}; {nearest(where, known)}"
    leaves = {key.rpartition(".")[2]: key for key in siblings}
    close = difflib.get_close_matches(last, leaves, n=1, cutoff=0.6)
    if not close and not section:  # a field's own name, misspelt
        leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
        close = difflib.get_close_matches(last, leaves, n=1, cutoff=0.8)
    return f"unknown key {where}; " + (
        f"did you mean {leaves[close[0]]}?" if close else f"known are {', '.join(siblings)}"
    )


def keys_of(kind: type) -> list[str]:
    """Return every key of a dataclass and of those in it, as `section.field`."""
    found = []
    for name, inner in field_types(kind).items():
        found.append(name)
        if dataclasses.is_dataclass(inner):
            found += [f"{name}.{key}" for key in keys_of(typing.cast(type, inner))]
    return found


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the resolved type of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _convert(kind: Any, data: object, path: str, problems: list[str]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and types.NoneType in typing.get_args(kind):
            return None
        return _convert(next(k for k in typing.get_args(kind) if k is not types.NoneType), data, path, problems)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), data, path, problems)
    if origin is tuple:
        items = data if isinstance(data, list | tuple) else [data]
        return tuple(_convert(typing.get_args(kind)[0], item, f"{path}[{i}]", problems) for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(data, Mapping):
            return _wrong(path, "a mapping", data, problems)
        inner = typing.get_args(kind)[1]
        return {str(key): _convert(inner, item, f"{path}.{key}", problems) for key, item in data.items()}
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if data not in choices:
            return _wrong(path, f"one of {', '.join(map(str, choices))}", data, problems)
        return data
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(data)
        except ValueError:
            return _wrong(path, f"one of {', '.join(str(item.value) for item in kind)}", data, problems)
    return _convert_scalar(kind, data, path, problems)


def _convert_dataclass(kind: type, data: object, path: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        return _wrong(path, "a mapping of fields", data, problems)
    before = len(problems)
    hints = field_types(kind)
    values: dict[str, Any] = {}
    for key, item in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            problems.append(unknown_key(where, kind, path))
        else:
            values[key] = _convert(hints[key], item, where, problems)
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            where = f"{path}.{field.name}" if path else field.name
            problems.append(f"{where} is missing; set it in the recipe or as {where}=VALUE")
    return kind(**values) if len(problems) == before else None


def _convert_scalar(kind: Any, data: object, path: str, problems: list[str]) -> Any:
    if kind is bool and isinstance(data, bool):
        return data
    if kind is int and not isinstance(data, bool):
        if isinstance(data, int):
            return data
        if isinstance(data, float) and data.is_integer():
            return int(data)
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if kind is str and isinstance(data, str):
        return data
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return _wrong(path, names.get(kind, str(kind)), data, problems)


def _wrong(path: str, wanted: str, found: object, problems: list[str]) -> None:
    # YAML reads 012, no and 4:00:00 as other things than text.
    remedy = "; put it in quotes" if wanted == "text" and isinstance(found, bool | int | float) else ""
    problems.append(f"{path} should be {wanted}, found {found!r}{remedy}")
