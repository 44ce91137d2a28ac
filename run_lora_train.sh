#!/usr/bin/env bash
# Trains a LoRA; without arguments on the embedded toy base, in about a minute. --help says more.
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
python=$(command -v python3 || command -v python) || { echo "$0: Python 3.11 or later is needed" >&2 && exit 2; }
exec "$python" scripts/start/set_up.py run_lora_train "$@"
