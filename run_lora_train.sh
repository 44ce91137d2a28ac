#!/usr/bin/env bash
# Trains a LoRA. Without arguments: on the embedded toy base and sample data, about a minute on a laptop's CPU.
#   bash run_lora_train.sh                                       the embedded default
#   bash run_lora_train.sh --max_train_steps 200                 the same with a flag changed
#   bash run_lora_train.sh sdxl                                  another family's toy base
#   bash run_lora_train.sh -m BASE -d my_pictures …              your own base and pictures; the family is found out
#   bash run_lora_train.sh [sd15|sdxl|sd3|flux|auto] [flags…]    flags are those of the training script
# With a model named, here or as MODEL_NAME in .env (see .env.example), settings come from config/recipe_FAMILY.yaml, or
# from your --config; flags on the command line win. It is started with accelerate and config/accelerate_config_a100_single.yaml;
# ACCELERATE_CONFIG=config/accelerate_config_multi_gpu.yaml bash run_lora_train.sh … takes another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh requirements.txt

family=auto
case "${1:-}" in sd15 | sdxl | sd3 | flux | auto) family=$1 && shift ;; esac

model="" own_config=no given=" " before=""
for word in "$@"; do
  case "$before" in -m | --pretrained_model_name_or_path | --model_name_or_path) model=$word ;; esac
  case "$word" in
    --pretrained_model_name_or_path=* | --model_name_or_path=*) model=${word#*=} ;;
    --config | --config=*) own_config=yes ;;
  esac
  given="$given${word%%=*} "
  before=$word
done

is_given() { # flags: whether one of them is on the command line
  local flag
  for flag in "$@"; do case "$given" in *" $flag "*) return 0 ;; esac; done
  return 1
}

# What .env says, as flags; the command line wins
settings=()
if [ -n "${MODEL_NAME:-}" ] && [ -z "$model" ] && [ "$own_config" = no ]; then
  model=$MODEL_NAME
  settings+=(-m "$model")
  if [ -n "${OUTPUT_DIR:-}" ] && ! is_given -o --output_dir --output_path; then settings+=(-o "$OUTPUT_DIR"); fi
  if [ -n "${VAE_NAME:-}" ] && ! is_given --pretrained_vae_model_name_or_path; then
    settings+=(--pretrained_vae_model_name_or_path "$VAE_NAME")
  fi
  if ! is_given -d --train_data_dir --data_dir --dataset_name --data_name --instance_data_dir; then
    if [ -n "${DATASET_NAME:-}" ]; then settings+=(--dataset_name "$DATASET_NAME"); fi
    if [ -n "${TRAIN_DATA_DIR:-}" ] && [[ "${DATASET_NAME:-x.py}" == *.py ]]; then settings+=(-d "$TRAIN_DATA_DIR"); fi
  fi
  if [ -n "${VALIDATION_PROMPTS+set}" ] && ! is_given --validation_prompt --eval_prompt; then
    settings+=(--validation_prompt "${VALIDATION_PROMPTS[@]}")
  fi
fi

recipe=()
if [ -z "$model" ] && [ "$own_config" = no ]; then
  if [ "$family" = auto ]; then family=sd15; fi
  recipe=(--config "config/toy_$family.yaml")
elif [ "$family" = auto ]; then
  if [ -z "$model" ]; then
    echo "run_lora_train.sh: with --config, name the family first: sd15, sdxl, sd3 or flux" >&2 && exit 2
  fi
  family=$("$PYTHON" scripts/bases/detect_family.py "$model")
fi
if [ -n "$model" ] && [ "$own_config" = no ]; then recipe=(--config "config/recipe_$family.yaml"); fi
if [ "$family" = flux ]; then script=train_dreambooth_lora_flux_advanced.py; else script=train_lora_$family.py; fi

# Weights & Biases without a login would wait for one: its files stay here, for `wandb sync`
if [ -n "$model" ] && [ -z "${WANDB_API_KEY:-}${WANDB_MODE:-}" ] && ! grep -qs 'api\.wandb\.ai' "$HOME/.netrc"; then
  export WANDB_MODE=offline
fi

# The toys need no launcher, and their errors stay one line; a named model is started by accelerate
launcher=()
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  launcher=(-m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG")
elif [ -n "$model" ] && command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  launcher=(-m accelerate.commands.launch --config_file config/accelerate_config_a100_single.yaml)
elif [ -n "$model" ]; then
  launcher=(-m accelerate.commands.launch --config_file config/accelerate_config_cpu.yaml)
fi
exec "$PYTHON" ${launcher[@]+"${launcher[@]}"} "$script" ${recipe[@]+"${recipe[@]}"} ${settings[@]+"${settings[@]}"} "$@"
