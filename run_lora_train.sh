#!/usr/bin/env bash
# Trains a LoRA. Without arguments: on the embedded toy base and sample data, about a minute on a laptop's CPU.
#   bash run_lora_train.sh                                  the embedded default
#   bash run_lora_train.sh --max_train_steps 200            the same with a flag changed
#   bash run_lora_train.sh -m BASE -d my_pictures …         your own: every flag of train_lora_sd15.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh requirements.txt

model_named=no
for word in "$@"; do
  case "$word" in -m | -m=* | --pretrained_model_name_or_path* | --model_name_or_path* | --config | --config=*) model_named=yes ;; esac
done
defaults=()
if [ "$model_named" = no ]; then defaults=(--config config/toy_sd15.yaml); fi
exec "$PYTHON" -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  train_lora_sd15.py "${defaults[@]}" "$@"
