#!/bin/bash

# Parameters
#SBATCH --account=solar
#SBATCH --array=0-6
#SBATCH --constraint=avx512
#SBATCH --cpus-per-task=4
#SBATCH --exclude=n004,n007
#SBATCH --job-name=orchestrate-tokenize-100--text-0a1b2c3d
#SBATCH --mem=4G
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output='/shared/100%% text/data.partial/logs/%A_%a.log'
#SBATCH --partition=cpu
#SBATCH --qos=long
#SBATCH --reservation=maintenance
#SBATCH --signal=CONT@60
#SBATCH --time=240

# setup
#SBATCH '--comment=a word'
module load python/3.11 || exit
ulimit -n 4096

# command
export SUBMITIT_EXECUTOR=slurm
exec PYTHON -P -m orchestrator.tokenize.worker '/shared/100% text/data.partial' --tasks 7 --workers 4 --task "$SLURM_ARRAY_TASK_ID"
