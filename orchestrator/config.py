"""Compose a run's settings from YAML and overrides. The only module that imports omegaconf.

A recipe is looked for in ./conf/recipe, then in ~/.config/orchestrate/recipe, then in the packaged
conf/; the first one counts, as a whole. Its `model`, `cluster` and `precision` are a name (conf/model/NAME.yaml),
a mapping, or a mapping with `from: NAME` and what differs. A file may begin with `from: NAME` as well,
and of its own name, which then means the next one on the search path: a site's conf/cluster/h100.yaml
is `from: h100` and its partition. Every `defaults.yaml` on that path lies under the recipe.

Overrides come last: `cluster=NAME` puts another file in the place of the recipe's, wherever it stands
among `section.field=value`. Text fields take the raw text, so that `4:00:00` stays. A field's own name
is enough where no other section has it: `tokens=2e10`.
"""

import dataclasses
import importlib.resources
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orchestrator.checks import settings_problems
from orchestrator.errors import ConfigError
from orchestrator.settings import RANDOM_BASE, ClusterSettings, PathSettings, RunSettings
from orchestrator.tracking_store import default_store
from orchestrator.values import field_types, from_plain, keys_of, nearest, to_plain, unknown_key

GROUPS = ("model", "cluster", "precision")


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
    chosen = _with_groups(_load_named("recipe", recipe), overrides)
    return _settings(_merge(_defaults(), chosen), overrides, f"recipe {recipe}")


def recompose(settings: RunSettings, overrides: Sequence[str], *, is_checked: bool = True) -> RunSettings:
    """Return a run's settings with overrides; defaults and recipes of today count no more.

    Args:
        is_checked: whether what `settings_problems` finds is an error; otherwise the caller asks it.

    Raises:
        ConfigError: every problem of the configuration at once.
    """
    resolved = typing.cast(DictConfig, OmegaConf.create(_as_text(to_plain(settings))))
    return _settings(_with_groups(resolved, overrides), overrides, f"run {settings.name}", is_checked=is_checked)


def _with_groups(chosen: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Put the files that overrides name in the place of a recipe's groups."""
    for override in overrides:
        if override.partition("=")[0] in GROUPS:
            chosen = _overlay(chosen, OmegaConf.create(dict([override.split("=", 1)])))
    return chosen


def _settings(merged: DictConfig, overrides: Sequence[str], what: str, *, is_checked: bool = True) -> RunSettings:
    problems: list[str] = []
    for override in overrides:
        if override.partition("=")[0] not in GROUPS:
            merged = _apply_override(merged, override, problems)
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{what} cannot be resolved: {error}") from error
    settings = from_plain(RunSettings, plain, "", problems)
    if settings is not None and not problems and is_checked:
        problems += settings_problems(settings)
    if settings is None or problems:
        raise ConfigError(f"{what} cannot be run as it is; {len(problems)} to mend:", problems)
    return _with_absolute_paths(settings)


def _as_text(value: Any) -> Any:
    """Escape what omegaconf would take for an interpolation in resolved settings."""
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return _raw(value) if isinstance(value, str) else value


def load_cluster(name: str) -> ClusterSettings:
    """Return a cluster's profile alone.

    Raises:
        ConfigError: there is none of that name, or it cannot be used.
    """
    problems: list[str] = []
    plain = OmegaConf.to_container(_load_named("cluster", name), resolve=True)
    cluster = from_plain(ClusterSettings, plain, "cluster", problems)
    if cluster is None:
        raise ConfigError(f"cluster {name} cannot be used:", problems)
    return cluster


def paths_in_force() -> PathSettings:
    """Return `paths` as the defaults on the search path say, for commands that need no recipe."""
    plain = OmegaConf.to_container(_defaults(), resolve=True)
    problems: list[str] = []
    paths = from_plain(PathSettings, plain.get("paths", {}) if isinstance(plain, dict) else {}, "paths", problems)
    if paths is None:
        raise ConfigError("conf/defaults.yaml cannot be used:", problems)
    return PathSettings(runs=str(Path(paths.runs).expanduser().absolute()))


def to_yaml(settings: RunSettings) -> str:
    """Return resolved settings as YAML."""
    return str(yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True))


def _defaults() -> DictConfig:
    merged = OmegaConf.create({})
    for folder in reversed(search_path()):
        if (folder / "defaults.yaml").exists():
            merged = _merge(merged, _load(folder / "defaults.yaml"))
    return merged


def _load_named(group: str, name: str, above: Sequence[Path] = ()) -> DictConfig:
    """Load a file with what it is `from`; `above` are the files that led here."""
    path = _find(group, name, above)
    loaded = _load(path)
    base = loaded.pop("from", None)
    lower = OmegaConf.create({}) if base is None else _load_named(group, str(base), [*above, path])
    return _overlay(lower, loaded)


def _find(group: str, name: str, above: Sequence[Path] = ()) -> Path:
    direct = Path(name).expanduser()
    if direct.suffix in (".yaml", ".yml"):
        if direct.exists() and direct not in above:
            return direct
        raise ConfigError(
            f"no {group} file {name}; name a file that is there, or one of {', '.join(known_names(group))}"
        )
    for folder in search_path():
        path = folder / group / f"{name}.yaml"
        if path.exists() and path not in above:
            return path
    folders = ", ".join(str(folder / group) for folder in search_path())
    if above:
        raise ConfigError(f"{above[-1]} is `from: {name}`, and there is no other {group} of that name in {folders}")
    raise ConfigError(f"no {group} named {name!r} in {folders}; {nearest(name, known_names(group))}")


def _load(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} should hold YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} should hold a mapping of fields, found {type(loaded).__name__}")
    return loaded


def _merge(lower: DictConfig, upper: DictConfig) -> DictConfig:
    return typing.cast(DictConfig, OmegaConf.merge(lower, upper))


def _overlay(lower: DictConfig, upper: DictConfig) -> DictConfig:
    """Put a mapping over another; a group's file that it names takes the place of the lower one."""
    for group in GROUPS:
        chosen = upper.get(group)
        if isinstance(chosen, str):
            upper[group] = _load_named(group, chosen)
        elif isinstance(chosen, DictConfig) and "from" in chosen:
            name = str(chosen.pop("from"))
            upper[group] = _merge(_load_named(group, name), chosen)
        else:
            continue
        lower.pop(group, None)
    return _merge(lower, upper)


def _apply_override(merged: DictConfig, override: str, problems: list[str]) -> DictConfig:
    key, separator, text = override.partition("=")
    if not separator or not key:
        problems.append(f"override {override!r} should read section.field=value")
        return merged
    key = whole_key(key)
    kind: Any = RunSettings
    for part in key.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        fields = field_types(kind) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else {}
        if part not in fields:
            problems.append(unknown_key(key, RunSettings))
            return merged
        kind = fields[part]
    value: Any = text
    if not _is_text(kind):
        if typing.get_args(kind) == (str, ...) and not text.startswith("["):
            value = [_raw(text)]
        else:
            try:
                value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[call-overload,index]
            except (YAMLError, OmegaConfBaseException) as error:
                problems.append(f"{key}={text} should be YAML: {' '.join(str(error).split())}")
                return merged
    elif types.NoneType in typing.get_args(kind) and text in ("", "null"):
        value = None
    else:
        value = _raw(text)
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(merged, OmegaConf.create(nested))


def whole_key(key: str) -> str:
    """Return `training.tokens` for `tokens`: a field's own name is enough where no other section has it."""
    if "." in key or key in field_types(RunSettings):
        return key
    same_name = [known for known in keys_of(RunSettings) if known.rpartition(".")[2] == key]
    return same_name[0] if len(same_name) == 1 else key


def _raw(text: str) -> str:
    """Escape omegaconf's interpolation: what a person types is text."""
    return text.replace("${", "\\${")


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
        phases=tuple(
            dataclasses.replace(phase, train=tuple(map(absolute, phase.train))) for phase in settings.data.phases
        ),
        validation=tuple(map(absolute, settings.data.validation)),
        index=absolute(settings.data.index) if settings.data.index else "",
    )
    runs = absolute(settings.paths.runs)
    uri = settings.tracking.uri or default_store(Path(runs))
    return dataclasses.replace(
        settings,
        base=settings.base if settings.base == RANDOM_BASE else absolute(settings.base),
        data=data,
        tracking=dataclasses.replace(settings.tracking, uri=uri),
        paths=PathSettings(runs=runs),
    )
