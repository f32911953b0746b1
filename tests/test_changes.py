"""What a resume may change: every field says so, and what is refused is named."""

import dataclasses

import pytest

from orchestrator.changes import OF_A_BRANCH, change_problems, changes_between, field_rules
from orchestrator.config import compose, recompose
from orchestrator.settings import Rule, RunSettings
from orchestrator.values import keys_of

SETTINGS = compose("demo-base", ["cluster.environment={A: b}"])


def test_every_field_declares_a_rule() -> None:
    rules = field_rules()
    for key in keys_of(RunSettings):
        assert any(key == field or key.startswith(f"{field}.") or field.startswith(f"{key}.") for field in rules), key
    assert set(rules.values()) == set(Rule)


def test_a_field_without_a_rule_is_an_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Undeclared:
        field: int = 1

    with pytest.raises(TypeError, match="field declares no rule"):
        field_rules(Undeclared)


@pytest.mark.parametrize(
    ("override", "field", "rule"),
    [
        ("checkpoint.keep_last=9", "checkpoint.keep_last", Rule.FREE),
        ("cluster.time_limit=4:00:00", "cluster.time_limit", Rule.FREE),
        ("checkpoint.interval_steps=7", "checkpoint.interval_steps", Rule.RECORDED),
        ("layout.micro_batch_size=2", "layout.micro_batch_size", Rule.RECORDED),
        ("precision=bf16", "precision.dtype", Rule.RECORDED),
        ("tokens=900000", "training.tokens", Rule.RECORDED),
        ("cluster.environment={A: b, C: d}", "cluster.environment.C", Rule.RECORDED),
        ("data.train=elsewhere", "data.train", Rule.PHASE),
        ("training.seed=5", "training.seed", Rule.FIXED),
        ("layout.global_batch_size=32", "layout.global_batch_size", Rule.FIXED),
        ("model.num_layers=16", "model.num_layers", Rule.FIXED),
        ("base=elsewhere", "base", Rule.FIXED),
    ],
)
def test_a_change_is_found_with_its_rule(override: str, field: str, rule: Rule) -> None:
    (change,) = changes_between(SETTINGS, recompose(SETTINGS, [override]))
    assert (change.field, change.rule) == (field, rule)


def test_no_override_is_no_change_whatever_the_defaults_are_by_now() -> None:
    assert recompose(SETTINGS, []) == SETTINGS
    odd = dataclasses.replace(SETTINGS, base="/models/${HOME}/x")
    assert recompose(odd, []).base == "/models/${HOME}/x"


def test_all_that_is_refused_is_named_at_once_and_the_rest_is_not() -> None:
    asked = ["training.seed=5", "model.num_layers=16", "data.train=other", "layout.micro_batch_size=2"]
    changes = changes_between(SETTINGS, recompose(SETTINGS, asked))
    problems = change_problems(changes, other_data="others were read")
    text = "\n".join(problems)
    assert len(problems) == 3
    assert "training.seed: 1234 -> 5: fixed for ever, since the order of the samples follows from it" in text
    assert "model.num_layers: 8 -> 16: fixed for ever, since the weights have this shape" in text
    assert "/other]: others were read" in text


def test_the_same_data_elsewhere_is_no_other_data() -> None:
    changes = changes_between(SETTINGS, recompose(SETTINGS, ["data.train=moved"]))
    assert change_problems(changes) == []
    (problem,) = change_problems(changes, other_data="others were read")
    assert problem.endswith("/moved]: others were read")


def test_a_branch_has_a_name_and_a_base_of_its_own_and_nothing_else_that_is_fixed() -> None:
    changes = changes_between(SETTINGS, recompose(SETTINGS, ["name=other", "base=other"]))
    assert change_problems(changes, own_fields=OF_A_BRANCH) == []
    name, base = change_problems(changes)
    assert name.startswith("name: ") and base.startswith("base: ")
    assert all("fixed for ever" in problem for problem in (name, base))
