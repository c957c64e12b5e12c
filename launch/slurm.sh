#!/bin/bash
# One launcher on each node, one rank on each GPU: sbatch launch/slurm.sh sft --config FILE [--key value ...]
# Change the numbers below, or pass them to sbatch. Submit from the repository's root.
#SBATCH --job-name=halfbyte
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -euo pipefail

GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-8}
# Read all hosts, then take the first: behind `| head`, a closed pipe may end scontrol, and with it the job.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_ADDRESS=${hosts%%$'\n'*}
export GPUS_PER_NODE MAIN_ADDRESS
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# --kill-on-bad-exit: a node that fails ends the others at once. The command is expanded on each node, since
# SLURM_NODEID differs.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file launch/multi_node.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
        -m halfbyte "$@"
' halfbyte "$@"
