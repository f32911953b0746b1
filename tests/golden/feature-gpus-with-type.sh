#!/bin/bash

# Parameters
#SBATCH --dependency=singleton
#SBATCH --gpus-per-node=h100:2
#SBATCH --job-name=orchestrate-solar
#SBATCH --no-kill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/solar/jobs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=B:USR2@300
#SBATCH --time=240

# setup
export PYTHONPATH=/shared/runs/solar/code PYTHONSAFEPATH=1

# command
export SUBMITIT_EXECUTOR=slurm
exec PYTHON -P -m orchestrator.slurm.supervisor /shared/runs/solar 1

# the ranks, on n002 and n001 in this order
srun \
    --ntasks=4 \
    --ntasks-per-node=2 \
    --nodelist=n002,n002,n001,n001 \
    --distribution=arbitrary \
    --kill-on-bad-exit=0 \
    --wait=0 \
    --overlap \
    --export=ALL \
    --output=/shared/runs/solar/attempts/0001/logs/rank_%4t.log \
    PYTHON \
    -P \
    -m \
    megatron_solar.worker \
    /shared/runs/solar \
    1

# in their environment
PYTHONPATH=/shared/runs/solar/code
PYTHONSAFEPATH=1
HF_HUB_OFFLINE=1
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
NCCL_NVLS_ENABLE=0
