#!/usr/bin/env bash
# Turns a folder of pictures into a training set: bash run_prepare_dataset.sh -d photos -o prepared --image_filtering …
# or says what is wrong with one: bash run_prepare_dataset.sh --doctor -d photos
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
python=$(command -v python3 || command -v python) || { echo "$0: Python 3.11 or later is needed" >&2 && exit 2; }
exec "$python" scripts/start/set_up.py run_prepare_dataset "$@"
