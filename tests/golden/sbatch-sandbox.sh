#!/bin/bash

# Parameters
#SBATCH --account=research
#SBATCH --dependency=singleton
#SBATCH --job-name=orchestrate-on-slurm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=RUNS/on-slurm/jobs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=B:USR2@60
#SBATCH --time=60
#SBATCH --wckey=submitit

# setup
export PYTHONPATH=RUNS/on-slurm/code PYTHONSAFEPATH=1

# command
export SUBMITIT_EXECUTOR=slurm
exec PYTHON -P -m orchestrator.slurm.supervisor RUNS/on-slurm
