#!/usr/bin/env bash
# Draws images with a trained LoRA as config/lora_infer.yaml says; every key is a flag: --seed 3 --prompt "a …"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh requirements.txt
exec "$PYTHON" infer_lora.py "$@"
