"""What depth_recovery.py trains: every run of a seed in its order, its steps and the course of its rate; no effects."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from benchmarks.depth_model import SHAPE, flops_per_token
from megatron_solar.depth import STRATEGIES
from orchestrator import freezing
from orchestrator.model_shape import TransformerShape

BASE_STEPS = 2400
CONTINUED_STEPS = 360
PEAK = 5e-3
END = PEAK / 10
RISE_SHARE = 0.05
REPLAY = 0.05

Rates = Literal["to the peak", "to a third", "constant", "falling"]
TOP_AND_BOTTOM: dict[Rates, tuple[float, float]] = {
    "to the peak": (PEAK, END),
    "to a third": (PEAK / 3, END),
    "constant": (END, END),
    "falling": (END, END / 10),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a seed.

    Attributes:
        start: a strategy by which the base is deepened, `base` as it is, or `nothing` but new weights.
        layers: of the model that is trained.
        trained: all weights, or only layers that are a copy of one before them.
        rates: up to the base's peak or a third of it in a twentieth of the steps, then by a cosine down to the rate at
            which the base ended; that rate throughout; or from it down to a tenth.
        kind: of the text trained on.
        replay: share of the sequences that the base has seen already.
    """

    name: str
    start: str
    layers: int = 12
    trained: Literal["all", "new"] = "all"
    rates: Rates = "to a third"
    kind: str = "English"
    replay: float = 0.0

    @property
    def shape(self) -> TransformerShape:
        """Shape of the model that is trained."""
        return dataclasses.replace(SHAPE, num_layers=self.layers)

    @property
    def steps(self) -> int:
        """Steps that the run does.

        A deepened model does CONTINUED_STEPS. The base trained on does as many as give the FLOPs of 12 layers in those,
        a model from scratch as many as give these FLOPs and the base's together.
        """
        own, base = flops_per_token(self.shape, None), flops_per_token(SHAPE, None)
        continued = CONTINUED_STEPS * flops_per_token(dataclasses.replace(SHAPE, num_layers=12), None)
        if self == BASE:
            return BASE_STEPS
        if self.start == "nothing":
            return round((BASE_STEPS * base + continued) / own)
        return round(continued / own) if self.start == "base" else CONTINUED_STEPS

    @property
    def evaluated_after(self) -> frozenset[int]:
        """Steps after which the held-out loss is taken."""
        if self.start == "nothing":
            return frozenset({*range(0, self.steps, 200), self.steps})
        early = (0, 40, 80, 160, 240) if self.kind == "Python" else (0, 5, 10, 20, 40, 60, 80, 120, 160, 240)
        return frozenset({*early, self.steps})

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, the first of which is 0."""
        top, bottom = TOP_AND_BOTTOM[self.rates]
        rise = RISE_SHARE * self.steps if top > END else 0
        if step < rise:
            return top * (step + 1) / (rise + 1)
        return bottom + (top - bottom) * (1 + math.cos(math.pi * (step - rise) / (self.steps - rise))) / 2


def new_layers(sources: Sequence[int]) -> frozenset[int]:
    """Return the layers that are a copy of one before them; for llama-pro those are the ones that begin as identity."""
    return frozenset(freezing.new_layers(sources, zeroed_layers=()))


def _depth(strategy: str) -> int:
    return 16 if strategy == "stack" else 12  # which can only double


RATES_OF_PYTHON: tuple[Rates, ...] = ("to a third", "constant")
BASE = Case(name="base", start="nothing", layers=8, rates="to the peak")
CASES = (
    BASE,
    Case(name="base, trained on", start="base", layers=8),
    *(
        Case(name=f"{strategy}, {trained}", start=strategy, layers=_depth(strategy), trained=trained)
        for trained in ("all", "new")
        for strategy in STRATEGIES
    ),
    Case(name="from scratch", start="nothing", rates="to the peak"),
    Case(name="solar, to the peak", start="solar", rates="to the peak"),
    Case(name="solar, falling", start="solar", rates="falling"),
    Case(name="base, constant", start="base", layers=8, rates="constant"),
    *(
        Case(name=f"{strategy}, constant", start=strategy, layers=_depth(strategy), rates="constant")
        for strategy in STRATEGIES
    ),
    *(
        Case(
            name=f"solar, Python, {rates}{', replay' if replay else ''}",
            start="solar",
            rates=rates,
            kind="Python",
            replay=replay,
        )
        for rates in RATES_OF_PYTHON
        for replay in (0.0, REPLAY)
    ),
)
