"""`orchestrate export`: a checkpoint as a Hugging Face folder."""

from pathlib import Path

import click

from orchestrator.commands.request import requested_checkpoint


@click.command(name="export", short_help="Write a checkpoint as a Hugging Face folder.")
@click.argument("run", default="last")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder to write; must not exist.")
@click.option("--verify", is_flag=True, help="Compare its logits with the checkpoint's, in fp32 on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(run: str, output: Path, verify: bool, as_json: bool) -> None:
    """Write a checkpoint of RUN as a Hugging Face folder that transformers loads.

    RUN is a name, `last`, or either with a step: `last@1200`; the newest complete checkpoint by default.
    """
    from orchestrator.plan import read_plan
    from orchestrator.progress import progress_bar
    from orchestrator.screen import print_json, print_next
    from orchestrator.settings import RANDOM_BASE
    from orchestrator.values import to_plain
    from orchestrator.verify import verify_export

    found, checkpoint = requested_checkpoint(run)
    from megatron_solar.export import export

    plan = read_plan(found.plan)
    if plan.settings.base != RANDOM_BASE and not Path(plan.settings.base).is_dir():
        click.echo(
            f"the base {plan.settings.base} is gone: the tokenizer is that of the data, and the base's chat template, "
            "generation settings, licence and lineage are left out",
            err=True,
        )
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
