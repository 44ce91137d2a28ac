#!/usr/bin/env bash
# Draws images with a trained LoRA as config/lora_infer.yaml says; every key is a flag: --seed 3 --prompt "a …"
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
python=$(command -v python3 || command -v python) || { echo "$0: Python 3.11 or later is needed" >&2 && exit 2; }
exec "$python" scripts/start/set_up.py run_lora_infer "$@"
