"""Which layer of the base each layer of a deeper model is copied from: the published rules, and explicit maps.

A rule is a row of `STRATEGIES`: which depths it can give, and the source of each layer. What a rule needs to know of
the base beyond its depth is the cosine of each layer's input and output, which `evaluate.py` measures.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.errors import ConfigError
from orchestrator.model_shape import divisors
from orchestrator.values import nearest

EXPLICIT = "map"
MOST_COPIES = 8  # of the whole net; G_stack was tried up to there
DRAWING_COLUMNS = 64


@dataclass(frozen=True, kw_only=True)
class DepthMap:
    """For each target layer its source layer.

    Attributes:
        strategy: the rule's name, or `map`.
        base_layers: how many layers the base has.
        sources: the base layer that each target layer is copied from.
        zeroed: target layers whose o_proj and down_proj are zero, so that at first they add nothing.
    """

    strategy: str
    base_layers: int
    sources: tuple[int, ...]
    zeroed: frozenset[int] = frozenset()

    def runs(self) -> list[tuple[int, range]]:
        """Return the stretches copied as they stand: (first target layer, base layers)."""
        found: list[tuple[int, range]] = []
        for target, source in enumerate(self.sources):
            is_alike = target > 0 and (target in self.zeroed) == (target - 1 in self.zeroed)
            if found and is_alike and source == found[-1][1].stop:
                first, layers = found[-1]
                found[-1] = (first, range(layers.start, source + 1))
            else:
                found.append((target, range(source, source + 1)))
        return found

    def seams(self) -> list[int]:
        """Return the target layers that do not follow in the base what they follow here; zeroed ones aside."""
        active = [target for target in range(len(self.sources)) if target not in self.zeroed]
        pairs = itertools.pairwise(active)
        return [target for before, target in pairs if self.sources[target] != self.sources[before] + 1]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A rule of depth up-scaling.

    Attributes:
        paper: where it is from.
        rule: what it does, in a few words.
        depths: what it can give of a number of base layers, ascending.
        usual: what it gives where no depth is asked for.
        sources: the source layers, by base layers, depth and the cosine of each base layer's input and output.
        zeroed: the target layers that add nothing at first, by base layers and depth.
        is_measured: whether it needs those cosines.
    """

    paper: str
    rule: str
    depths: Callable[[int], Sequence[int]]
    usual: Callable[[int], int]
    sources: Callable[[int, int, Sequence[float]], tuple[int, ...]]
    zeroed: Callable[[int, int], frozenset[int]] = lambda layers, depth: frozenset()
    is_measured: bool = False


def _solar(layers: int, depth: int, cosines: Sequence[float]) -> tuple[int, ...]:
    kept = depth // 2
    return (*range(kept), *range(layers - kept, layers))


def _yi_middle(layers: int, depth: int, cosines: Sequence[float]) -> tuple[int, ...]:
    width = depth - layers
    first = max(range(layers - width + 1), key=lambda start: sum(cosines[start : start + width]))
    return (*range(first + width), *range(first, layers))


def _llama_pro(layers: int, depth: int, cosines: Sequence[float]) -> tuple[int, ...]:
    size = layers // (depth - layers)
    return tuple(source for end in range(size, layers + 1, size) for source in (*range(end - size, end), end - 1))


def _llama_pro_zeroed(layers: int, depth: int) -> frozenset[int]:
    size = layers // (depth - layers)
    return frozenset(range(size, depth, size + 1))


STRATEGIES = {
    "solar": Strategy(
        paper="arXiv 2312.15166",
        rule="two copies, the first without its last layers, the second without its first",
        depths=lambda layers: range(layers // 2 * 2 + 2, 2 * layers + 1, 2),
        usual=lambda layers: 2 * (layers - layers // 4),  # a quarter is left out of each copy, 8 of 32
        sources=_solar,
    ),
    "yi-middle": Strategy(
        paper="arXiv 2403.04652",
        rule="the stretch of layers that change their input least, by the cosine of input and output, comes twice",
        depths=lambda layers: range(layers + 1, 2 * layers + 1),
        usual=lambda layers: layers + max(1, layers // 2),  # Yi-9B: 16 of 32
        sources=_yi_middle,
        is_measured=True,
    ),
    "llama-pro": Strategy(
        paper="arXiv 2401.02415",
        rule="after each group a copy of its last layer with o_proj and down_proj zero, which adds nothing at first",
        depths=lambda layers: [layers + groups for groups in divisors(layers)],
        usual=lambda layers: layers + min(divisors(layers), key=lambda groups: abs(groups - layers / 4)),  # 8 of 32
        sources=_llama_pro,
        zeroed=_llama_pro_zeroed,
    ),
    "stack": Strategy(
        paper="arXiv 2405.15319",
        rule="the whole net stacked on itself (G_stack)",
        depths=lambda layers: range(2 * layers, MOST_COPIES * layers + 1, layers),
        usual=lambda layers: 2 * layers,
        sources=lambda layers, depth, cosines: tuple(range(layers)) * (depth // layers),
    ),
}


def paper_of(strategy: str) -> str:
    """Return where a rule is from."""
    return "an explicit map" if strategy == EXPLICIT else STRATEGIES[strategy].paper


def rule_of(strategy: str) -> str:
    """Return what a rule does, in a few words."""
    return "layers as they were named" if strategy == EXPLICIT else STRATEGIES[strategy].rule


def is_measured(strategy: str) -> bool:
    """Return whether a rule needs the cosines of the base's layers.

    Raises:
        ConfigError: no such strategy.
    """
    return _strategy(strategy).is_measured


def depth_map(strategy: str, base_layers: int, layers: int | None = None, *, cosines: Sequence[float] = ()) -> DepthMap:
    """Return a rule's map.

    Args:
        layers: depth wanted; the rule's usual one where it is None.
        cosines: of each base layer's input and output, for a rule that is measured.

    Raises:
        ConfigError: no such strategy, a depth that it cannot give (the message has those it can), or no cosines.
    """
    rule = _strategy(strategy)
    depths = list(rule.depths(base_layers))
    wanted = rule.usual(base_layers) if layers is None else layers
    if wanted not in depths:
        near = sorted(sorted(depths, key=lambda depth: (abs(depth - wanted), depth))[:4])
        raise ConfigError(
            f"layers={wanted} cannot be made of {base_layers} layers by {strategy}; "
            f"nearest are {', '.join(map(str, near))} (it gives {_between(depths[0], depths[-1])})"
        )
    if rule.is_measured and len(cosines) != base_layers:
        raise ConfigError(
            f"{strategy} chooses by what each of the {base_layers} layers does to a text; give one with --text FILE"
        )
    return DepthMap(
        strategy=strategy,
        base_layers=base_layers,
        sources=rule.sources(base_layers, wanted, cosines),
        zeroed=rule.zeroed(base_layers, wanted),
    )


def solar_depth_map(base_layers: int, drop: int) -> DepthMap:
    """Return SOLAR's map by the layers that each copy loses: base layers 0..n-m-1, then m..n-1.

    Raises:
        ConfigError: with that many left out the model would be no deeper.
    """
    most = (base_layers - 1) // 2
    if not 0 <= drop <= most:
        raise ConfigError(
            f"drop={drop} gives no deeper model of {base_layers} layers by solar; use {_between(0, most)}"
        )
    return depth_map("solar", base_layers, 2 * (base_layers - drop))


def explicit_map(text: str, base_layers: int) -> DepthMap:
    """Return a map that was written down: `0-23,8-31`, both ends included.

    Raises:
        ConfigError: it is no such list, or names a layer that the base lacks.
    """
    sources: list[int] = []
    for part in text.replace(" ", "").split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise ConfigError(f"map {text!r} should list base layers, such as 0-23,8-31; found {part!r}")
        first, last = int(ends[0]), int(ends[-1])
        if first > last or last >= base_layers:
            raise ConfigError(
                f"map {text!r} asks for base layers {part}; the base has 0-{base_layers - 1}, and the lower comes first"
            )
        sources += range(first, last + 1)
    return DepthMap(strategy=EXPLICIT, base_layers=base_layers, sources=tuple(sources))


def draw(layers: DepthMap) -> str:
    """Return the map as text: a row for each stretch of base layers, at its place in the base."""
    scale = -(-layers.base_layers // DRAWING_COLUMNS)  # base layers a column
    columns = -(-layers.base_layers // scale)
    rows = [("result", "base", f"0{layers.base_layers - 1:>{columns - 1}}" if columns > 1 else "0")]
    for first, run in layers.runs():
        mark = "░" if first in layers.zeroed else "█"
        bar = "".join(
            mark if range(max(run.start, column), min(run.stop, column + scale)) else "·"
            for column in range(0, layers.base_layers, scale)
        )
        rows.append((_span(first, first + len(run) - 1), _span(run.start, run.stop - 1), bar))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{result:>{widths[0]}}   {base:>{widths[1]}}   {bar}" for result, base, bar in rows]
    lines += [
        f"seam: base layer {layers.sources[target]} follows base layer {layers.sources[target - 1]} "
        f"at result layer {target}"
        for target in layers.seams()
    ]
    if layers.zeroed:
        lines.append("░ adds nothing at first: its o_proj and down_proj are zero")
    return "\n".join(lines)


def _strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise ConfigError(f"no strategy {name!r}; {nearest(name, STRATEGIES)}")
    return STRATEGIES[name]


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
