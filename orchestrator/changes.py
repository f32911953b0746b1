"""What a resume changes, by the rule that each field of the settings declares. Pure."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from orchestrator.settings import Rule, RunSettings
from orchestrator.values import to_plain

OF_A_BRANCH = ("name", "base", "paths.runs")
"""Fixed fields that tell one run from another, so that a branch has its own."""

_WHY_FIXED = {
    "layout.global_batch_size": "the samples of a step follow from it",
    "data.sequence_length": "the samples are cut by it",
    "training.seed": "the order of the samples follows from it",
    "model": "the weights have this shape",
    "base": "the run has weights of its own by now",
    "name": "the folder is named so",
    "paths.runs": "the folder lies there",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A field with another value than before."""

    field: str
    before: Any
    after: Any
    rule: Rule

    def describe(self) -> str:
        """Return 'cluster.nodes: 32 -> 24'."""
        return f"{self.field}: {_shown(self.before)} -> {_shown(self.after)}"


def field_rules(kind: type = RunSettings, path: str = "") -> dict[str, Rule]:
    """Return the rule of every field, `section.field` to rule; a section with one rule stands as a whole.

    Raises:
        TypeError: a field declares none.
    """
    found: dict[str, Rule] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        where = f"{path}.{name}" if path else name
        declared = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Rule)]
        if declared:
            found[where] = declared[0]
        elif dataclasses.is_dataclass(hint):
            found |= field_rules(typing.cast(type, hint), where)
        else:
            raise TypeError(f"{where} declares no rule for a resume; make it Free, Recorded, Phase or Fixed")
    return found


def changes_between(before: RunSettings, after: RunSettings) -> list[Change]:
    """Return every field that differs, in the order of the schema."""
    old, new = _flat(to_plain(before)), _flat(to_plain(after))
    rules = field_rules()
    found = []
    for field in [*old, *(field for field in new if field not in old)]:
        if old.get(field) != new.get(field):
            owner = field
            while owner not in rules:
                owner = owner.rpartition(".")[0]
            found.append(Change(field=field, before=old.get(field), after=new.get(field), rule=rules[owner]))
    return found


def change_problems(changes: Sequence[Change], *, other_data: str = "", own_fields: Sequence[str] = ()) -> list[str]:
    """Return every change that a run cannot take up, each with the reason.

    Args:
        other_data: why the samples that were read are not those of the changed plan; nothing where they are, wherever
            the data sets lie now and whatever comes later.
        own_fields: fixed fields that may differ nevertheless.
    """
    problems = []
    for change in changes:
        if change.rule == Rule.FIXED and change.field not in own_fields:
            section = change.field.partition(".")[0]
            why = _WHY_FIXED.get(change.field) or _WHY_FIXED.get(section, "another value is another run")
            problems.append(f"{change.describe()}: fixed for ever, since {why}")
        if change.rule == Rule.PHASE and other_data:
            problems.append(f"{change.describe()}: {other_data}")
    return problems


def _flat(value: object, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (path and not value):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
