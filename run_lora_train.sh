#!/usr/bin/env bash
# Trains a LoRA. Without arguments: on the embedded toy base and sample data, under a minute on a laptop's CPU.
#   bash run_lora_train.sh                                       the embedded default
#   bash run_lora_train.sh --max_train_steps 200                 the same with a flag changed
#   bash run_lora_train.sh sdxl                                  another family's toy base
#   bash run_lora_train.sh -m BASE -d my_pictures …              your own base and pictures; the family is found out
#   bash run_lora_train.sh [sd15|sdxl|auto] [flags…]             flags are those of the training script
# Several GPUs: ACCELERATE_CONFIG=config/….yaml bash run_lora_train.sh …
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh requirements.txt

family=auto
case "${1:-}" in sd15 | sdxl | auto) family=$1 && shift ;; esac

model="" own_config=no words=("$@")
for i in "${!words[@]}"; do
  case "${words[$i]}" in
    -m | --pretrained_model_name_or_path | --model_name_or_path) model=${words[$((i + 1))]:-} ;;
    --pretrained_model_name_or_path=* | --model_name_or_path=*) model=${words[$i]#*=} ;;
    --config | --config=*) own_config=yes ;;
  esac
done
defaults=()
if [ -z "$model" ] && [ "$own_config" = no ]; then
  if [ "$family" = auto ]; then family=sd15; fi
  defaults=(--config "config/toy_$family.yaml")
elif [ "$family" = auto ]; then
  if [ -z "$model" ]; then echo "run_lora_train.sh: with --config, name the family first: sd15 or sdxl" >&2 && exit 2; fi
  family=$("$PYTHON" scripts/detect_family.py "$model")
fi
script=train_lora_$family.py
if [ ! -f "$script" ]; then echo "run_lora_train.sh: there is no script for $family yet" >&2 && exit 2; fi
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  how=(--config_file "$ACCELERATE_CONFIG")
else
  how=(--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
fi
exec "$PYTHON" -m accelerate.commands.launch "${how[@]}" "$script" "${defaults[@]}" "$@"
