"""`orchestrate export`: a checkpoint as a Hugging Face folder."""

from pathlib import Path

import click


@click.command(name="export", short_help="Write a checkpoint as a Hugging Face folder.")
@click.argument("run", default="last")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder to write; must not exist.")
@click.option("--verify", is_flag=True, help="Compare its logits with the checkpoint's, in fp32 on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(run: str, output: Path, verify: bool, as_json: bool) -> None:
    """Write a checkpoint of RUN as a Hugging Face folder that transformers loads.

    RUN is a name, `last`, or either with a step: `last@1200`; the newest complete checkpoint by default.
    """
    from orchestrator.checkpoints import choose_checkpoint
    from orchestrator.config import paths_in_force
    from orchestrator.plan import read_plan
    from orchestrator.progress import progress_bar
    from orchestrator.run_directory import find_run
    from orchestrator.screen import print_json, print_next
    from orchestrator.values import to_plain
    from orchestrator.verify import verify_export

    reference, at, step = run.rpartition("@") if not Path(run).is_dir() else (run, "", "")
    if not at:
        reference, step = run, ""
    digits = step.removeprefix("step_").split(".")[0]
    if at and not (digits.isascii() and digits.isdigit()):
        raise click.UsageError(f"{run!r} should read RUN or RUN@STEP, such as last@1200")
    found = find_run(reference, Path(paths_in_force().runs))
    checkpoint = choose_checkpoint(found, int(digits) if digits else None)
    from megatron_solar.export import export

    plan = read_plan(found.plan)
    with progress_bar("export", unit="parameters") as show:
        sums = export(checkpoint, plan, output, run_name=found.name, progress=show)
    verified = verify_export(found, checkpoint, output) if verify else None
    if as_json:
        print_json(
            {"output": str(output), "step": checkpoint.step, "files": dict(sums.files), "verified": to_plain(verified)}
        )
        return
    click.echo(f"wrote {checkpoint.name} of run {found.name} to {output}: {plan.parameters:,} parameters")
    if verified is not None:
        click.echo(
            f"logits of {verified.tokens_compared} tokens differ from Megatron's by at most "
            f"{verified.largest_logit_difference:.1e}"
        )
    print_next(f"python -c \"import transformers; transformers.AutoModelForCausalLM.from_pretrained('{output}')\"")
