"""Pictures of a run, drawn by matplotlib without a screen."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.events import Event, StepEvent, ValidationEvent
from orchestrator.rehearsal_report import Phase


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


def draw_timeline(path: Path, title: str, phases: Sequence[Phase], marks: Mapping[str, float]) -> None:
    """Draw the phases of a run's attempts over seconds, a row an attempt, with a line at each mark.

    Args:
        marks: Unix time of what happened, by its name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    zero = min((phase.begins for phase in phases), default=0.0)
    attempts = sorted({phase.attempt for phase in phases})
    names = list(dict.fromkeys(phase.name for phase in phases))
    figure, axes = pyplot.subplots(figsize=(9, 1.8 + 0.5 * len(attempts)))
    for number, name in enumerate(names):
        own = [phase for phase in phases if phase.name == name]
        axes.barh(
            [attempts.index(phase.attempt) for phase in own],
            [phase.seconds for phase in own],
            left=[phase.begins - zero for phase in own],
            color=f"C{number}",
            label=name,
        )
    for number, (name, moment) in enumerate(marks.items()):
        axes.axvline(moment - zero, color="k", ls=("--", ":", "-.")[number % 3], lw=1, label=name)
    axes.set_yticks(range(len(attempts)), [f"attempt {attempt}" for attempt in attempts])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, fontsize="small")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
