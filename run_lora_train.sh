#!/usr/bin/env bash
# Trains a LoRA. Without arguments: on the embedded toy base and sample data, under a minute on a laptop's CPU.
#   bash run_lora_train.sh                                       the embedded default
#   bash run_lora_train.sh --max_train_steps 200                 the same with a flag changed
#   bash run_lora_train.sh sdxl                                  another family's toy base
#   bash run_lora_train.sh -m BASE -d my_pictures …              your own base and pictures; the family is found out
#   bash run_lora_train.sh [sd15|sdxl|sd3|auto] [flags…]             flags are those of the training script
# Several GPUs: ACCELERATE_CONFIG=config/….yaml bash run_lora_train.sh …
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh requirements.txt

family=auto
case "${1:-}" in sd15 | sdxl | sd3 | auto) family=$1 && shift ;; esac

model="" own_config=no before=""
for word in "$@"; do
  case "$before" in -m | --pretrained_model_name_or_path | --model_name_or_path) model=$word ;; esac
  case "$word" in
    --pretrained_model_name_or_path=* | --model_name_or_path=*) model=${word#*=} ;;
    --config | --config=*) own_config=yes ;;
  esac
  before=$word
done
defaults=()
if [ -z "$model" ] && [ "$own_config" = no ]; then
  if [ "$family" = auto ]; then family=sd15; fi
  defaults=(--config "config/toy_$family.yaml")
elif [ "$family" = auto ]; then
  if [ -z "$model" ]; then echo "run_lora_train.sh: with --config, name the family first: sd15, sdxl or sd3" >&2 && exit 2; fi
  family=$("$PYTHON" scripts/detect_family.py "$model")
fi
script=train_lora_$family.py
if [ ! -f "$script" ]; then echo "run_lora_train.sh: there is no script for $family yet" >&2 && exit 2; fi
# One process needs no launcher (and its errors stay one line); a configuration of accelerate's does
launcher=()
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  launcher=(-m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG")
elif [ -f "${HF_HOME:-$HOME/.cache/huggingface}/accelerate/default_config.yaml" ]; then
  launcher=(-m accelerate.commands.launch)
fi
exec "$PYTHON" ${launcher[@]+"${launcher[@]}"} "$script" ${defaults[@]+"${defaults[@]}"} "$@"
