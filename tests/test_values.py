"""The decoder of frozen dataclasses, and numbers as people read them."""

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.config import compose
from orchestrator.plan import TrainingPlan, make_plan
from orchestrator.settings import RunSettings
from orchestrator.units import format_bytes, format_count, format_duration
from orchestrator.values import from_plain, nearest, to_plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"
    shares: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    name: str = "x"
    limit: float | None = None
    is_on: bool = False
    words: dict[str, str] = dataclasses.field(default_factory=dict)


at_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, size=st.integers(), kind=st.sampled_from(["a", "b"]), shares=st.lists(finite).map(tuple))
outers = st.builds(
    Outer,
    inner=inners,
    name=st.text(),
    limit=st.none() | finite,
    is_on=st.booleans(),
    words=st.dictionaries(st.text(), st.text()),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["inner", "size", "name", "x"]), inner),
    max_leaves=8,
)


@at_any_speed
@given(outers)
def test_a_value_comes_back_through_json_as_it_was(value: Outer) -> None:
    problems: list[str] = []
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value))), "", problems) == value
    assert problems == []


@at_any_speed
@given(plain)
def test_any_data_gives_a_value_or_says_why_not(data: Any) -> None:
    problems: list[str] = []
    value = from_plain(Outer, data, "", problems)
    assert (value is None) == bool(problems)
    if value is not None:
        again: list[str] = []
        assert from_plain(Outer, to_plain(value), "", again) == value


@pytest.mark.parametrize("recipe", ["solar-10.7b", "demo", "demo-base"])
def test_settings_and_plan_come_back_through_json_as_they_were(recipe: str) -> None:
    plan = make_plan(compose(recipe))
    problems: list[str] = []
    assert from_plain(TrainingPlan, json.loads(json.dumps(to_plain(plan))), "", problems) == plan
    assert from_plain(RunSettings, json.loads(json.dumps(to_plain(plan.settings))), "", problems) == plan.settings
    assert problems == []


def test_every_problem_is_listed_with_its_whole_key() -> None:
    problems: list[str] = []
    data = {"inner": {"siez": 1, "kind": "c", "shares": [1, "x"]}, "limit": "high", "is_on": 1, "words": {"a": 1}}
    assert from_plain(Outer, data, "top", problems) is None
    assert problems == [
        "unknown key top.inner.siez; did you mean top.inner.size?",
        "top.inner.kind should be one of a, b, found 'c'",
        "top.inner.shares[1] should be a number, found 'x'",
        "top.inner.size is missing; set it in the recipe or as top.inner.size=VALUE",
        "top.limit should be a number, found 'high'",
        "top.is_on should be true or false, found 1",
        "top.words.a should be text, found 1; put it in quotes",
    ]


def test_earlier_problems_do_not_hide_a_good_value() -> None:
    problems = ["an earlier one"]
    assert from_plain(Inner, {"size": 1e3}, "", problems) == Inner(size=1000)
    assert problems == ["an earlier one"]


def test_the_nearest_name_or_all_of_them() -> None:
    assert nearest("lanch", ["launch", "logs"]) == "did you mean launch?"
    assert nearest("zzz", ["b", "a"]) == "known are a, b"


def test_the_fingerprint_follows_the_settings() -> None:
    plan = make_plan(compose("demo"))
    assert plan.fingerprint == make_plan(compose("demo")).fingerprint
    assert plan.fingerprint != make_plan(compose("demo", ["training.seed=1"])).fingerprint


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1 k", "1 kB"),
        (1536, "1.54 k", "1.54 kB"),
        (999_999, "1 M", "1 MB"),
        (10_731_524_096, "10.7 B", "10.7 GB"),
        (999.7, "1 k", "1 kB"),
        (2.5, "2.5", "2 B"),
        (1.5e12, "1.5 T", "1.5 TB"),
        (1.5e16, "15000 T", "15000 TB"),
    ],
)
def test_counts_and_bytes_have_three_digits_and_no_exponent(value: float, count: str, size: str) -> None:
    assert format_count(value) == count
    assert format_bytes(value) == size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (3.21, "3.2 s"), (59.4, "59 s"), (125, "2 min 5 s"), (3599.7, "1 h 0 min"), (93784, "1 d 2 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
