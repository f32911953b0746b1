#!/bin/bash

# Parameters
#SBATCH --account=research
#SBATCH --dependency=singleton
#SBATCH --gpus-per-node=8
#SBATCH --job-name=orchestrate-on-slurm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=RUNS/on-slurm/jobs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=B:USR2@600
#SBATCH --time=1440
#SBATCH --wckey=submitit

# setup
export PYTHONPATH=RUNS/on-slurm/code PYTHONSAFEPATH=1

# command
export SUBMITIT_EXECUTOR=slurm
exec PYTHON -P -m orchestrator.slurm.supervisor RUNS/on-slurm
