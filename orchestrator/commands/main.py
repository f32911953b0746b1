"""`orchestrate`: the group of commands, each loaded only when it is called.

Errors of the project's own tree are printed without a traceback and decide the exit code.
"""

import importlib
import os
import sys

import click

from orchestrator.errors import OrchestrateError
from orchestrator.version import VERSION

# In the order in which a newcomer meets them; the help of each is its function's docstring.
COMMANDS = {
    "demo": "Run the whole path on this machine: text in, a trained and exported model out.",
    "doctor": "Say what works on this machine, what does not, and the remedy.",
    "tokenize": "Turn text into Megatron data sets.",
    "data": "Look into data sets, merge them, index them, see what a step of a run saw.",
    "upscale": "Deepen a Hugging Face model by copies of its layers, by SOLAR's rule or another.",
    "plan": "Show layout, memory, steps and cost of a recipe, without starting anything.",
    "launch": "Start a run.",
    "status": "Show where a run stands, or list all runs.",
    "why": "Say why the attempts of a run ended, and what to do.",
    "logs": "Show what the ranks of a run wrote.",
    "cancel": "End a run, saving first.",
    "resume": "Go on with a run that ended.",
    "sandbox": "Run a real Slurm of many nodes on this machine, to try a launch on.",
    "ui": "Open the run browser.",
    "export": "Write a checkpoint as a Hugging Face folder.",
}


class LazyGroup(click.Group):
    """A group whose commands are modules of this package, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"orchestrator.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command where one is misspelt."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from orchestrator.values import nearest

            ctx.fail(f"no command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="orchestrate")
def group() -> None:
    """Deepen a 7B base to 48 layers, pretrain it further with Megatron on Slurm, and export it.

    The same commands run on a laptop's CPU. Start with `orchestrate demo`.
    """


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 usage or config, 3 cluster or tracker away."""
    try:
        group(prog_name="orchestrate", standalone_mode=False)
    except OrchestrateError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `orchestrate logs | head`: nobody reads on
        sys.exit(1)
    except OSError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
