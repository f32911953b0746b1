"""Control of an up-scaling and pretraining run: configuration, plan, run folder, Slurm, tracking."""
