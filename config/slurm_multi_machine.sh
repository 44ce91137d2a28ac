#!/bin/bash
# One training on several machines under Slurm; words after the file are the training script and its flags:
#   sbatch --nodes 2 config/slurm_multi_machine.sh train_lora_sdxl.py --config config/presets/sdxl_80gb.yaml \
#     -m BASE -d my_pictures -o output/my_lora --resume_from_checkpoint latest
# Two minutes before the time is up Slurm sends SIGUSR1: the training writes a checkpoint, and the job queues itself again.
#SBATCH --job-name=lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=$(python3 scripts/start/set_up.py environment | tail -n 1)

MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PYTHON MAIN_ADDRESS GPUS=${SLURM_GPUS_ON_NODE:-8}

# Runs on each machine. The launcher would die of the signal, so it ignores it, and the shell hands it to the launcher's children.
on_machine='
  ( trap "" USR1
    exec "$PYTHON" scripts/start/launch.py --config_file config/accelerate_config_multi_machine.yaml \
      --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) \
      --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" "$@" ) &
  launcher=$! asked=no status=0
  trap "asked=yes; pkill -USR1 -P $launcher || true" USR1
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" && status=0 || status=$?; done
  if [ "$asked" = yes ]; then exit 138; fi
  exit "$status"'

trap '' USR1
status=0
srun bash -c "$on_machine" on_machine "$@" || status=$?
if [ "$status" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
