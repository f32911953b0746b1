"""Pictures of a run, drawn by matplotlib without a screen."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from orchestrator.events import Event, StepEvent, ValidationEvent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """The events of one run, attempt by attempt, under a name for the legend."""

    name: str
    attempts: Sequence[Sequence[Event]]


def draw_losses(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Draw training and held-out loss against tokens, with a line where a later attempt begins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), sharey=True, squeeze=False)
    for panel, curve in zip(axes[0], curves, strict=True):
        events = [event for attempt in curve.attempts for event in attempt]
        steps = [event for event in events if isinstance(event, StepEvent)]
        held_out = [event for event in events if isinstance(event, ValidationEvent)]
        panel.plot([s.consumed_tokens / 1e3 for s in steps], [s.loss for s in steps], lw=1, label="training")
        panel.plot(
            [v.consumed_tokens / 1e3 for v in held_out],
            [v.loss for v in held_out],
            marker="o",
            ms=4,
            label="held-out",
        )
        for number, attempt in enumerate(curve.attempts[1:], start=2):
            first = next((event for event in attempt if isinstance(event, StepEvent)), None)
            if first is not None:
                panel.axvline(first.consumed_tokens / 1e3, color="0.5", ls="--", lw=1, label=f"attempt {number}")
        panel.set_title(curve.name)
        panel.set_xlabel("tokens trained on (thousands)")
        panel.grid(alpha=0.3)
        panel.legend()
    axes[0][0].set_ylabel("loss (nats a token)")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
