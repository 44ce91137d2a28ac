#!/usr/bin/env bash
# Turns a folder of pictures into a training set: bash run_prepare_dataset.sh -d photos -o prepared --image_filtering …
# or says what is wrong with one: bash run_prepare_dataset.sh --doctor -d photos
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh requirements.txt
exec "$PYTHON" scripts/dataset/prepare_dataset.py "$@"
