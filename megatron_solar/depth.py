"""Which layer of the base each layer of a deeper model is copied from.

SOLAR's rule, arXiv 2312.15166: of two copies of the n layers, one loses its last m and the other its
first m; stacked they are 2(n - m) layers. For 32 layers and m = 8 these are base layers 0-23 and 8-31.
"""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import ConfigError
from orchestrator.values import nearest

DRAWING_COLUMNS = 64


@dataclass(frozen=True, kw_only=True)
class DepthMap:
    """For each target layer its source layer.

    Attributes:
        base_layers: how many layers the base has.
        sources: the base layer that each target layer is copied from.
    """

    base_layers: int
    sources: tuple[int, ...]

    def runs(self) -> list[tuple[int, range]]:
        """Return the stretches copied as they stand: (first target layer, base layers)."""
        found: list[tuple[int, range]] = []
        for target, source in enumerate(self.sources):
            if found and source == found[-1][1].stop:
                first, layers = found[-1]
                found[-1] = (first, range(layers.start, source + 1))
            else:
                found.append((target, range(source, source + 1)))
        return found


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A rule of depth up-scaling.

    Attributes:
        paper: where it is from.
        rule: what it does, in a few words.
        drops: the values of `drop` that give a deeper model, by the number of base layers.
        sources: the source layers, by the number of base layers and `drop`.
    """

    paper: str
    rule: str
    drops: Callable[[int], range]
    sources: Callable[[int, int], tuple[int, ...]]


STRATEGIES = {
    "solar": Strategy(
        paper="arXiv 2312.15166",
        rule="two copies, the first without its last layers, the second without its first",
        drops=lambda layers: range((layers + 1) // 2),
        sources=lambda layers, drop: (*range(layers - drop), *range(drop, layers)),
    ),
}


def depth_map(strategy: str, num_layers: int, drop: int) -> DepthMap:
    """Return the map of a strategy.

    Raises:
        ConfigError: no such strategy, or a `drop` with which it gives no deeper model.
    """
    rule = _strategy(strategy)
    drops = rule.drops(num_layers)
    if drop not in drops:
        raise ConfigError(
            f"drop={drop} gives no deeper model of {num_layers} layers by {strategy}; "
            f"use {_between(drops[0], drops[-1])}"
        )
    return DepthMap(base_layers=num_layers, sources=rule.sources(num_layers, drop))


def solar_depth_map(num_layers: int, drop: int) -> DepthMap:
    """Return SOLAR's map: base layers 0..n-m-1, then m..n-1."""
    return depth_map("solar", num_layers, drop)


def default_drop(num_layers: int) -> int:
    """Return SOLAR's share, a quarter of the layers: 8 of 32."""
    return num_layers // 4


def drop_for_layers(strategy: str, num_layers: int, wanted: int) -> int:
    """Return the drop that gives a model of `wanted` layers.

    Raises:
        ConfigError: no drop does; the message has the depths that can be.
    """
    rule = _strategy(strategy)
    depths = {len(rule.sources(num_layers, drop)): drop for drop in rule.drops(num_layers)}
    if wanted not in depths:
        near = sorted(sorted(depths, key=lambda depth: (abs(depth - wanted), depth))[:4])
        raise ConfigError(
            f"layers={wanted} cannot be made of {num_layers} layers by {strategy}; "
            f"nearest are {', '.join(map(str, near))} (it gives {_between(min(depths), max(depths))})"
        )
    return depths[wanted]


def draw(layers: DepthMap) -> str:
    """Return the map as text: a row for each stretch of base layers, at its place in the base."""
    scale = -(-layers.base_layers // DRAWING_COLUMNS)  # base layers a column
    columns = -(-layers.base_layers // scale)
    rows = [("result", "base", f"0{layers.base_layers - 1:>{columns - 1}}" if columns > 1 else "0")]
    for first, run in layers.runs():
        bar = "".join(
            "█" if range(max(run.start, column), min(run.stop, column + scale)) else "·"
            for column in range(0, layers.base_layers, scale)
        )
        rows.append((_span(first, first + len(run) - 1), _span(run.start, run.stop - 1), bar))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{result:>{widths[0]}}   {base:>{widths[1]}}   {bar}" for result, base, bar in rows]
    lines += [
        f"seam: base layer {layers.sources[first]} follows base layer {layers.sources[first - 1]} "
        f"at result layer {first}"
        for first, _ in layers.runs()[1:]
    ]
    return "\n".join(lines)


def _strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise ConfigError(f"no strategy {name!r}; {nearest(name, STRATEGIES)}")
    return STRATEGIES[name]


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
