#!/bin/bash

# Parameters
#SBATCH --dependency=singleton
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=orchestrate-solar
#SBATCH --mem=0
#SBATCH --no-kill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/solar/jobs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=B:USR2@600
#SBATCH --time=1440

# setup
export PYTHONPATH=/shared/runs/solar/code PYTHONSAFEPATH=1

# command
export SUBMITIT_EXECUTOR=slurm
exec PYTHON -P -m orchestrator.slurm.supervisor /shared/runs/solar 1

# the ranks, on n002 and n001 in this order
srun \
    --ntasks=16 \
    --ntasks-per-node=8 \
    --nodelist=n002,n002,n002,n002,n002,n002,n002,n002,n001,n001,n001,n001,n001,n001,n001,n001 \
    --distribution=arbitrary \
    --kill-on-bad-exit=0 \
    --wait=0 \
    --overlap \
    --export=ALL \
    --output=/shared/runs/solar/attempts/0001/logs/rank_%4t.log \
    apptainer \
    exec \
    --nv \
    --no-home \
    --pwd=/shared/runs/solar \
    --bind=/shared/runs:/shared/runs,/shared/data/train:/shared/data/train:ro,/shared/data/held-out:/shared/data/held-out:ro,/shared/base:/shared/base:ro \
    /shared/images/megatron.h100-apptainer \
    env \
    PYTHONPATH=/shared/runs/solar/code \
    PYTHONSAFEPATH=1 \
    HF_HUB_OFFLINE=1 \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    NCCL_NVLS_ENABLE=0 \
    /usr/bin/python3 \
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
