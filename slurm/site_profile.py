"""What a site's profile makes of a job: options of sbatch and srun, the script's first lines, a rank's command. Pure.

Slurm 22.05's manual pages, and what was seen on a Slurm of our own (docs/log.md):

- Nothing on the srun line asks for GPUs. A step with `--overlap` gets all that its job asked for, and each rank sees
  all of its node's, so that the worker takes the one of its local rank. Where a site's own line gives each rank one
  (`--gpus-per-task=1`), the worker sees one and takes that.
- Ranks are counted along `nodes` as it is ordered: `--distribution=arbitrary` with every node named once a rank.
  A plain `--nodelist` is sorted by Slurm.
"""

import shlex
from collections.abc import Mapping, Sequence

from orchestrator.checks import time_limit_seconds
from orchestrator.gpu_environment import rank_variables, set_variables, unset_variables
from orchestrator.plan import TrainingPlan
from orchestrator.run_directory import RunDirectory
from orchestrator.settings import RANDOM_BASE, ClusterSettings, RunSettings, SlurmSettings


def sbatch_options(plan: TrainingPlan, job_name: str, bad_nodes: Sequence[str] = ()) -> dict[str, object]:
    """Return the options of sbatch by their long names, with _ for -; True stands for one without a value.

    Args:
        bad_nodes: of the run's earlier jobs; left out beside the site's own.
    """
    cluster = plan.settings.cluster
    slurm = cluster.slurm
    most = cluster.nodes + cluster.spare_nodes
    options: dict[str, object] = {
        "job_name": job_name,
        "nodes": f"{cluster.nodes}-{most}" if cluster.spare_nodes else cluster.nodes,
        **_processor_options(cluster),
        "time": (time_limit_seconds(cluster.time_limit) or 0) // 60,
        # B: the warning goes to the job's main process, which is the supervisor, and not to the ranks.
        "signal": f"B:USR2@{cluster.warning_seconds}",
        "no_kill": True,  # the allocation outlives a dead node; the supervisor says what follows
        "dependency": "singleton",
        "requeue" if slurm.requeue else "no_requeue": True,
        "exclusive": slurm.exclusive,
        **_gpu_option(cluster),
    }
    if_set: dict[str, object] = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": slurm.constraint,
        "exclude": ",".join(dict.fromkeys([*slurm.exclude, *bad_nodes])),
        "switches": slurm.switches,
        "mem": slurm.memory,
    }
    return {name: value for name, value in {**options, **if_set}.items() if value not in (None, "", False)}


def script_setup(run: RunDirectory, plan: TrainingPlan) -> list[str]:
    """Return the script's lines before the supervisor."""
    return [
        *site_lines(plan.settings.cluster.slurm),
        f"export PYTHONPATH={shlex.quote(str(run.code))} PYTHONSAFEPATH=1",
    ]


def site_lines(slurm: SlurmSettings) -> list[str]:
    """Return what a site wants at the beginning of any job's script."""
    return [
        *(f"#SBATCH {shlex.quote(line)}" for line in slurm.sbatch_lines),  # read until the first command
        *(f"module load {shlex.quote(module)} || exit" for module in slurm.modules),
        *slurm.setup,
    ]


def srun_options(plan: TrainingPlan, *, nodes: Sequence[str], ranks_per_node: int, output: str) -> list[str]:
    """Return what stands between `srun` and the ranks' command.

    SLURM_HOSTFILE must not be set in srun's environment: it counts more than `--nodelist`.

    Args:
        nodes: on which ranks start; rank r runs on nodes[r // ranks_per_node].
        output: as `--output` takes it.
    """
    cluster = plan.settings.cluster
    slurm = cluster.slurm
    host_of_rank = [node for node in nodes for _ in range(ranks_per_node)]
    options = [  # without --nodes: srun 24.11 refuses it beside --distribution=arbitrary
        f"--ntasks={len(host_of_rank)}",
        f"--ntasks-per-node={ranks_per_node}",
        f"--nodelist={','.join(host_of_rank)}",
        "--distribution=arbitrary",
        # The supervisor ends what a failed rank leaves behind. srun would as well, also when the first rank has saved
        # and left with 75 while others still write.
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--overlap",  # a step that cannot be cleaned up does not block the next
        "--export=ALL",  # also where the job was submitted with --export=NONE
        f"--output={output}",
    ]
    if slurm.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={slurm.cpus_per_rank}")
    if slurm.cpu_bind is not None:
        options.append(f"--cpu-bind={slurm.cpu_bind}")
    if slurm.memory_bind is not None:
        options.append(f"--mem-bind={slurm.memory_bind}")
    return [*options, *_pyxis_options(plan.settings), *slurm.srun_lines]


def rank_command(run: RunDirectory, plan: TrainingPlan, words: Sequence[str]) -> list[str]:
    """Return the command of a rank: the site's words before it, the container, and what is run in it.

    In a container the variables are set by `env`, since an image's own values would count more than srun's.
    """
    cluster = plan.settings.cluster
    container = cluster.container
    before = list(cluster.slurm.pre_command)
    if container.runtime == "none":
        return [*before, *words]
    variables = [f"{name}={value}" for name, value in worker_variables(run, plan).items()]
    variables = [*(f"--unset={name}" for name in unset_names(plan)), *variables]
    if container.runtime == "apptainer":
        before += [
            *("apptainer", "exec"),
            *(["--nv"] if cluster.device == "cuda" else []),
            "--no-home",  # packages of ~/.local must not come before the image's
            f"--pwd={run.path}",
            f"--bind={','.join(_mounts(plan.settings))}",
            *container.arguments,
            container.image,
        ]
    return [*before, "env", *variables, *words]


def worker_variables(run: RunDirectory, plan: TrainingPlan) -> dict[str, str]:
    """Return what a rank finds in its environment beside what the job inherited."""
    variables = {
        "PYTHONPATH": str(run.code),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",  # hundreds of ranks never ask a hub; whatever they need is in the run
        **set_variables(rank_variables(plan.settings, plan.layout)),
    }
    if plan.settings.cluster.device == "cpu":
        variables["OMP_NUM_THREADS"] = "1"  # a process that forks must have no threads
        variables["TORCH_GLOO_LAZY_INIT"] = "1"  # connections when they are needed, not every rank with every other
    return {name: value for name, value in variables.items() if name not in unset_names(plan)}


def unset_names(plan: TrainingPlan) -> list[str]:
    """Return the variables that a rank must not have: those that the site's profile leaves empty."""
    return unset_variables(rank_variables(plan.settings, plan.layout))


def _processor_options(cluster: ClusterSettings) -> Mapping[str, object]:
    """Return what is asked of each node's processors.

    With a range of nodes never by a number of tasks: Slurm would give as few nodes as hold those of the fewest
    (seen with 22.05: `--nodes=3-4 --ntasks-per-node=1` got 3 of 4 idle ones).
    """
    cpus = cluster.slurm.cpus_per_rank
    if cluster.spare_nodes:
        return {"mincpus": cluster.ranks_per_node * (cpus or 1)}
    return {"ntasks_per_node": cluster.ranks_per_node, "cpus_per_task": cpus}


def _gpu_option(cluster: ClusterSettings) -> Mapping[str, object]:
    if cluster.device != "cuda" or cluster.slurm.gpus == "none":
        return {}
    kind = f"{cluster.slurm.gpu_type}:" if cluster.slurm.gpu_type else ""
    if cluster.slurm.gpus == "gres":
        return {"gres": f"gpu:{kind}{cluster.ranks_per_node}"}
    return {"gpus_per_node": f"{kind}{cluster.ranks_per_node}"}


def _pyxis_options(settings: RunSettings) -> list[str]:
    container = settings.cluster.container
    if container.runtime != "pyxis":
        return []
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(_mounts(settings))}",
        f"--container-workdir={settings.paths.runs}/{settings.name}",
        "--no-container-mount-home",  # packages of ~/.local must not come before the image's
        *container.arguments,
    ]


def _mounts(settings: RunSettings) -> list[str]:
    """Return what a container sees of the shared disk, at the same paths: the runs, data and base, and a site's own."""
    data, base, runs = settings.data, settings.base, settings.paths.runs
    named = [*data.training_folders, *data.validation, data.index, base if base != RANDOM_BASE else ""]
    read = dict.fromkeys(path for path in named if path)
    # The runs' folder as a whole: in it lies the run with its code.
    return [f"{runs}:{runs}", *(f"{path}:{path}:ro" for path in read), *settings.cluster.container.mounts]
