"""Tables and the picture of what depth_recovery.py found; see there."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.depth_cases import BASE, BASE_STEPS, CASES, Case
from benchmarks.depth_model import BATCH_TOKENS, SHAPE, Point, flops_per_token
from megatron_solar.depth import STRATEGIES
from orchestrator.files import write_atomic

BASE_FLOPS = BASE_STEPS * BATCH_TOKENS * flops_per_token(SHAPE, None)
COLOURS = dict(zip(STRATEGIES, ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5"), strict=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a seed, with the loss at which that seed's base ended, by kind of text."""

    case: Case
    seed: int
    points: Sequence[Point]
    base_loss: float

    def end(self, kind: str = "English") -> float:
        """Return the held-out loss after the last step."""
        return self.points[-1].losses[kind]

    def start(self, kind: str = "English") -> float:
        """Return the held-out loss before the first step."""
        return self.points[0].losses[kind]

    def regained(self) -> float | None:
        """Return the tokens from which on the loss stays at the base's; between two points a straight line."""
        over = [point.losses["English"] - self.base_loss for point in self.points]
        above = [number for number, excess in enumerate(over) if excess > 0]
        if not above:
            return 0.0
        last = above[-1]
        if last + 1 == len(over):
            return None
        before, after = self.points[last].tokens, self.points[last + 1].tokens
        return before + (after - before) * over[last] / (over[last] - over[last + 1])


Runs = Mapping[str, Sequence[Run]]
COLUMNS = ("layers", "seeds", "TFLOPs", "jump at the start", "tokens to regain", "end", "end − base trained on")


def write(document: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Put the tables of the runs that there are into a document, and draw the picture beside it.

    Raises:
        SystemExit: the document has no place for a table.
    """
    runs = _runs(list(records))
    text = document.read_text(encoding="utf-8")
    for name, table in {"strategies": _strategies(runs), "rates": _rates(runs), "kinds": _kinds(runs)}.items():
        begin, end = f"<!-- {name}, written by --report -->\n", f"\n<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{document} should have {begin.strip()} and {end.strip()} around its table")
        text = text.partition(begin)[0] + begin + table + end + text.partition(end)[2]
    write_atomic(document, text)
    picture = document.with_suffix("") / "recovery.svg"
    picture.parent.mkdir(exist_ok=True)
    _draw(picture, runs)


def _runs(records: Sequence[Mapping[str, Any]]) -> Runs:
    cases = {case.name: case for case in CASES}
    points = {(r["case"], r["seed"]): [Point(**point) for point in r["points"]] for r in records}
    found: dict[str, list[Run]] = {name: [] for name in cases}
    for (name, seed), own in sorted(points.items()):
        base_loss = points[BASE.name, seed][-1].losses["English"]
        found[name].append(Run(case=cases[name], seed=seed, points=own, base_loss=base_loss))
    return found


# --- Tables


def _strategies(runs: Runs) -> str:
    names = [BASE.name, "base, trained on", "from scratch"]
    names += [f"{strategy}, {trained}" for trained in ("all", "new") for strategy in STRATEGIES]
    rows = [[name, *_columns(runs, runs[name])] for name in names if runs[name]]
    return _table(["run", *COLUMNS], rows)


def _rates(runs: Runs) -> str:
    names = ["base, trained on", "solar, to the peak", "solar, all", "solar, falling", "base, constant"]
    names += [f"{strategy}, constant" for strategy in STRATEGIES]
    rows = [[own[0].case.start, own[0].case.rates, *_columns(runs, own)] for name in names if (own := runs[name])]
    return _table(["start", "rate", *COLUMNS], rows)


def _columns(runs: Runs, own: Sequence[Run]) -> list[str]:
    case = own[0].case
    reference = {run.seed: run.end() for run in runs["base, trained on"]}
    against = [run.end() - reference[run.seed] for run in own if run.seed in reference]
    return [
        str(case.layers),
        str(len(own)),
        f"{_spent(own[0].points[-1], own[0]):.2f}",
        _mean([run.start() - run.base_loss for run in own], "+.3f") if case.start in STRATEGIES else "",
        _regained([run.regained() for run in own]) if case.start != "nothing" else "",
        _mean([run.end() for run in own], ".3f"),
        _mean(against, "+.3f") if case.name != "base, trained on" else "",
    ]


def _kinds(runs: Runs) -> str:
    rows = []
    for own in runs.values():
        if not own or own[0].case.kind != "Python":
            continue
        case = own[0].case
        forgotten = [run.end() - run.base_loss for run in own]
        rows.append(
            [
                case.rates,
                f"{case.replay:.0%}",
                str(len(own)),
                *(_mean([run.start(kind) for run in own], ".3f") for kind in ("Python", "English")),
                *(_mean([run.end(kind) for run in own], ".3f") for kind in ("Python", "English")),
                _mean(forgotten, "+.3f"),
            ]
        )
    head = ["rate", "replay", "seeds", "Python, start", "English, start", "Python, end", "English, end"]
    return _table([*head, "English, end − base"], rows)


def _regained(tokens: Sequence[float | None]) -> str:
    reached = [count for count in tokens if count is not None]
    if not reached:
        return "not reached"
    missing = f" (not by {len(tokens) - len(reached)})" if len(reached) < len(tokens) else ""
    return _mean([count / 1e3 for count in reached], ".0f") + " k" + missing


def _mean(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation over seeds."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}".replace("-", "−")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Picture


def _draw(path: Path, runs: Runs) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "depth", "svg.fonttype": "none"}  # the same results give the same file
    from matplotlib import pyplot

    figure, (by_tokens, by_flops, by_kind) = pyplot.subplots(1, 3, figsize=(16, 5))
    _draw_tokens(by_tokens, runs)
    _draw_flops(by_flops, runs)
    _draw_kinds(by_kind, runs)
    for axes in (by_tokens, by_flops, by_kind):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_tokens(axes: Any, runs: Runs) -> None:
    axes.set_title("After up-scaling, English (dashed: only new layers trained)")
    axes.set_xlabel("tokens since the base's end (thousands)")
    axes.set_ylabel("held-out loss − that of the base at its end")
    for strategy, colour in COLOURS.items():
        _curve(axes, runs[f"{strategy}, all"], _continued, _excess, color=colour, label=strategy)
        _curve(axes, runs[f"{strategy}, new"], _continued, _excess, color=colour, ls="--")
    _curve(axes, runs["base, trained on"], _continued, _excess, color="0.4", label="base, trained on")
    axes.axhline(0, color="0", ls=":", lw=1)


def _draw_flops(axes: Any, runs: Runs) -> None:
    axes.set_title("The base's FLOPs included (dashed: only new layers trained)")
    axes.set_xlabel("TFLOPs")
    axes.set_ylabel("held-out loss, nats a token")
    colours = {BASE.name: "0", "base, trained on": "0.5", "from scratch": "#f59f00"}
    for name, colour in colours.items():
        _curve(axes, runs[name], _spent, _english, color=colour, label=name)
    for strategy, colour in COLOURS.items():
        _curve(axes, runs[f"{strategy}, all"], _spent, _english, color=colour, label=strategy)
        _curve(axes, runs[f"{strategy}, new"], _spent, _english, color=colour, ls="--")
    ends = [run.end() for own in runs.values() for run in own if run.case.kind == "English"]
    if ends:
        axes.set(xlim=(BASE_FLOPS / 1e12 * 0.6, None), ylim=(min(ends) - 0.05, max(ends) + 0.4))


def _draw_kinds(axes: Any, runs: Runs) -> None:
    axes.set_title("solar, trained on with Python (dashed: loss on English)")
    axes.set_xlabel("tokens since the base's end (thousands)")
    axes.set_ylabel("held-out loss, nats a token")
    shown = [own for own in runs.values() if own and own[0].case.kind == "Python"]
    for own, colour in zip(shown, ("#1f6feb", "#2b8a3e", "#d9480f", "#9c36b5"), strict=False):
        name = own[0].case.name.removeprefix("solar, Python, ")
        _curve(axes, own, _continued, lambda point, run: point.losses["Python"], color=colour, label=name)
        _curve(axes, own, _continued, _english, color=colour, ls="--")
    if runs[BASE.name]:
        level = statistics.mean(run.end() for run in runs[BASE.name])
        axes.axhline(level, color="0", ls=":", lw=1, label="the base's on English")


def _continued(point: Point, run: Run) -> float:
    return point.tokens / 1e3


def _spent(point: Point, run: Run) -> float:
    return (point.flops + (0 if run.case.start == "nothing" else BASE_FLOPS)) / 1e12


def _english(point: Point, run: Run) -> float:
    return point.losses["English"]


def _excess(point: Point, run: Run) -> float:
    return point.losses["English"] - run.base_loss


def _curve(
    axes: Any,
    runs: Sequence[Run],
    x: Callable[[Point, Run], float],
    y: Callable[[Point, Run], float],
    **style: Any,
) -> None:
    """Draw the mean over seeds, and what lies between the lowest and the highest."""
    if not runs:
        return
    columns = list(zip(*([y(point, run) for point in run.points] for run in runs), strict=True))
    xs = [x(point, runs[0]) for point in runs[0].points]
    axes.plot(xs, [statistics.mean(column) for column in columns], lw=1.5, **style)
    lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(xs, lowest, highest, color=style["color"], alpha=0.15, lw=0)
