"""Compose a run's settings from YAML and overrides. The only module that imports omegaconf.

A recipe is looked for in ./conf/recipe, then in ~/.config/orchestrate/recipe, then in the packaged
conf/. Its `model` and `cluster` are a name (conf/model/NAME.yaml), a mapping, or a mapping with
`from: NAME` and what differs. Every `defaults.yaml` on that search path lies under the recipe.
`section.field=value` overrides come last; text fields take the raw text, so that `4:00:00` stays.
"""

import dataclasses
import importlib.resources
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orchestrator.errors import ConfigError
from orchestrator.checks import settings_problems
from orchestrator.settings import RANDOM_BASE, PathSettings, RunSettings
from orchestrator.values import field_types, from_plain, nearest, to_plain

GROUPS = ("model", "cluster")


def search_path() -> list[Path]:
    """Return the configuration folders, the strongest first."""
    packaged = importlib.resources.files("orchestrator.conf")
    return [
        Path.cwd() / "conf",
        Path.home() / ".config" / "orchestrate",
        Path(str(packaged.joinpath("model/tiny.yaml"))).parent.parent,
    ]


def known_names(group: str) -> list[str]:
    """Return the names in a group over the whole search path."""
    return sorted({path.stem for folder in search_path() for path in (folder / group).glob("*.yaml")})


def compose(recipe: str, overrides: Sequence[str] = ()) -> RunSettings:
    """Return the settings of a recipe with overrides, checked as a whole.

    Args:
        recipe: a name on the search path, or the path of a YAML file.
        overrides: `section.field=value` each.

    Raises:
        ConfigError: every problem of the configuration at once.
    """
    problems: list[str] = []
    merged = OmegaConf.create({})
    for folder in reversed(search_path()):
        if (folder / "defaults.yaml").exists():
            merged = _merge(merged, _load(folder / "defaults.yaml"))
    merged = _merge(merged, _expand_groups(_load(_find("recipe", recipe))))
    for override in overrides:
        merged = _apply_override(merged, override, problems)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"recipe {recipe} cannot be resolved: {error}") from error
    settings = from_plain(RunSettings, plain, "", problems)
    if settings is not None and not problems:
        problems += settings_problems(settings)
    if settings is None or problems:
        raise ConfigError(f"recipe {recipe} cannot be run as it is; {len(problems)} to mend:", problems)
    return _with_absolute_paths(settings)


def paths_in_force() -> PathSettings:
    """Return `paths` as the defaults on the search path say, for commands that need no recipe."""
    merged = OmegaConf.create({})
    for folder in reversed(search_path()):
        if (folder / "defaults.yaml").exists():
            merged = _merge(merged, _load(folder / "defaults.yaml"))
    plain = OmegaConf.to_container(merged, resolve=True)
    problems: list[str] = []
    paths = from_plain(PathSettings, plain.get("paths", {}) if isinstance(plain, dict) else {}, "paths", problems)
    if paths is None:
        raise ConfigError("conf/defaults.yaml cannot be used:", problems)
    return PathSettings(runs=str(Path(paths.runs).expanduser().absolute()))


def to_yaml(settings: RunSettings) -> str:
    """Return resolved settings as YAML."""
    return str(OmegaConf.to_yaml(OmegaConf.create(to_plain(settings))))


def _find(group: str, name: str) -> Path:
    direct = Path(name).expanduser()
    if direct.suffix in (".yaml", ".yml") and direct.exists():
        return direct
    for folder in search_path():
        if (folder / group / f"{name}.yaml").exists():
            return folder / group / f"{name}.yaml"
    raise ConfigError(
        f"no {group} named {name!r} in {', '.join(str(folder / group) for folder in search_path())}; "
        f"{nearest(name, known_names(group))}"
    )


def _load(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} should hold YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} should hold a mapping of fields, found {type(loaded).__name__}")
    return loaded


def _merge(lower: DictConfig, upper: DictConfig) -> DictConfig:
    return typing.cast(DictConfig, OmegaConf.merge(lower, upper))


def _expand_groups(recipe: DictConfig) -> DictConfig:
    """Replace `model: NAME` and `model: {from: NAME, ...}` by the fields of conf/model/NAME.yaml."""
    for group in GROUPS:
        chosen = recipe.get(group)
        if isinstance(chosen, str):
            recipe[group] = _load(_find(group, chosen))
        elif isinstance(chosen, DictConfig) and "from" in chosen:
            rest = OmegaConf.create({key: value for key, value in chosen.items() if key != "from"})
            recipe[group] = _merge(_load(_find(group, str(chosen["from"]))), rest)
    return recipe


def _apply_override(merged: DictConfig, override: str, problems: list[str]) -> DictConfig:
    key, separator, text = override.partition("=")
    if not separator:
        problems.append(f"override {override!r} should read section.field=value")
        return merged
    if key in GROUPS:
        return _merge(merged, OmegaConf.create({key: _load(_find(key, text))}))
    kind: Any = RunSettings
    for part in key.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        fields = field_types(kind) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else {}
        if part not in fields:
            problems.append(f"unknown key {key}; {nearest(part, fields)}" if fields else f"unknown key {key}")
            return merged
        kind = fields[part]
    value: Any = text
    if not _is_text(kind):
        if typing.get_origin(kind) is tuple and not text.startswith("["):
            value = [text]
        else:
            try:
                value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[call-overload,index]
            except (YAMLError, OmegaConfBaseException) as error:
                problems.append(f"{key}={text} should be YAML: {error}")
                return merged
            if typing.get_args(kind) == (float, ...) and not isinstance(value, list):
                value = [value]
    elif types.NoneType in typing.get_args(kind) and text in ("", "null"):
        value = None
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(merged, OmegaConf.create(nested))


def _is_text(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return True
    return kind is str or (types.NoneType in typing.get_args(kind) and str in typing.get_args(kind))


def _with_absolute_paths(settings: RunSettings) -> RunSettings:
    def absolute(text: str) -> str:
        return str(Path(text).expanduser().absolute().resolve())

    data = dataclasses.replace(
        settings.data,
        train=tuple(map(absolute, settings.data.train)),
        validation=tuple(map(absolute, settings.data.validation)),
    )
    runs = absolute(settings.paths.runs)
    tracking = settings.tracking
    if not tracking.uri:
        tracking = dataclasses.replace(tracking, uri=f"sqlite:///{Path(runs).parent / 'mlflow.db'}")
    return dataclasses.replace(
        settings,
        base=settings.base if settings.base == RANDOM_BASE else absolute(settings.base),
        data=data,
        tracking=tracking,
        paths=PathSettings(runs=runs),
    )
