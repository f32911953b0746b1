"""`orchestrate sandbox`: a real Slurm of many nodes on this machine, to try a launch on."""

import click

NAME = click.option("--name", default="sandbox", show_default=True, help="Which one, where several run.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.group(name="sandbox", short_help="Run a real Slurm of many nodes on this machine.")
def command() -> None:
    """Run a real Slurm of many nodes on this machine, to try a launch before it is queued.

    The nodes have fake GPUs; the ranks of `cluster=sandbox` run on the CPU. It listens on the loopback
    interface and lets in nobody but its owner.
    """


@command.command(name="start", short_help="Start it.")
@click.option("--nodes", type=click.IntRange(1, 512), default=32, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(1, 16), default=8, show_default=True)
@click.option("--accounting", is_flag=True, help="With slurmdbd and a database, so that sacct answers.")
@NAME
@AS_JSON
def start_command(nodes: int, gpus_per_node: int, accounting: bool, name: str, as_json: bool) -> None:
    """Start slurmctld and a slurmd for each node; about a second, with accounting four."""
    from orchestrator.screen import print_facts, print_json, print_next
    from orchestrator.slurm.sandbox import start
    from orchestrator.values import to_plain

    sandbox = start(name, nodes=nodes, gpus_per_node=gpus_per_node, accounting=accounting)
    if as_json:
        print_json({**to_plain(sandbox), "slurm_conf": str(sandbox.slurm_conf)})
        return
    isolation = "each with its own PIDs and host name, so that a killed one takes its ranks along"
    print_facts(
        f"sandbox {sandbox.name}",
        [
            ("nodes", f"{nodes} x {gpus_per_node} fake GPUs"),
            ("isolation", isolation if sandbox.own_namespaces else "none: nodes share this machine's processes"),
            ("access", "its owner, by a munge key of its own; loopback interface only"),
            ("accounting", "slurmdbd, with a database of its own" if sandbox.accounting else "none"),
            ("folder", sandbox.folder),
            ("use it", f"export SLURM_CONF={sandbox.slurm_conf}"),
        ],
    )
    print_next(f"orchestrate sandbox status --name {sandbox.name}")


@command.command(name="status", short_help="Show its nodes and jobs.")
@NAME
@AS_JSON
def status_command(name: str, as_json: bool) -> None:
    """Show how many nodes are in which state, and what is queued and running."""
    from collections import Counter

    from orchestrator.screen import print_facts, print_json, print_next
    from orchestrator.slurm.sandbox import found, node_states

    sandbox = found(name)
    states = node_states(sandbox)
    jobs = [line.split(maxsplit=3) for line in sandbox.ask("squeue", "--noheader", "--format=%i %T %D %j").splitlines()]
    if as_json:
        print_json(
            {
                "name": name,
                "slurm_conf": str(sandbox.slurm_conf),
                "nodes": states,
                "jobs": [{"id": i, "state": s, "nodes": int(n), "name": j} for i, s, n, j in jobs],
            }
        )
        return
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(states.values()).items()))
    facts = [("nodes", counts), ("use it", f"export SLURM_CONF={sandbox.slurm_conf}")]
    facts += [("job", f"{job} {state} on {nodes} nodes: {title}") for job, state, nodes, title in jobs]
    print_facts(f"sandbox {name}", facts)
    print_next(f"orchestrate sandbox stop --name {name}")


@command.command(name="stop", short_help="End it and all that runs on it.")
@NAME
def stop_command(name: str) -> None:
    """End its jobs and daemons and remove its folder."""
    from orchestrator.slurm.sandbox import stop

    stop(name)
    click.echo(f"sandbox {name} is gone")
