"""`orchestrate demo`: the whole path on this machine."""

import time
from pathlib import Path

import click


@click.command(name="demo", short_help="Run the whole path on this machine.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Your own text; the standard library's sources by default."
)
@click.option("--output", type=click.Path(path_type=Path), help="A new folder; ~/orchestrate/demo-TIME by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(text: Path | None, output: Path | None, as_json: bool) -> None:
    """Run the whole path on this machine, in about 4 minutes on two cores.

    Text in; data sets, a small base, its up-scaled model trained by two ranks with an interruption, and
    an exported model out. Everything is real, only small; each step says which command does it alone.
    """
    from orchestrator.demo import run_demo
    from orchestrator.screen import notice, print_facts, print_json, print_next
    from orchestrator.units import format_count, format_duration
    from orchestrator.values import to_plain

    folder = output or Path.home() / "orchestrate" / time.strftime("demo-%Y%m%d-%H%M%S")
    summary = run_demo(folder.expanduser().absolute(), text, notice)
    if as_json:
        print_json(to_plain(summary))
        return
    losses = (
        f"base {summary.held_out_loss_base:.3f}, fresh up-scaled {summary.held_out_loss_upscaled:.3f}, "
        f"trained on {summary.held_out_loss_trained:.3f}"
    )
    trained = (
        f"{format_count(summary.tokens)} tokens at {format_count(summary.tokens_per_second)} tokens/s, in "
        f"{summary.attempts} attempts (interrupted after step {summary.interrupted_after_step})"
    )
    print_facts(
        "the whole path, done",
        [
            ("held-out loss", losses),
            ("trained", trained),
            ("export", f"logits within {summary.largest_logit_difference:.1e} of the Megatron model's"),
            ("generated", repr(summary.generated)),
            ("checkpoint", summary.checkpoint),
            ("model", summary.exported_model),
            ("picture", summary.loss_picture),
            ("took", format_duration(summary.seconds)),
        ],
    )
    print_next("orchestrate ui")
