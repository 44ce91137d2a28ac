#!/usr/bin/env bash
# Sets up what is missing and runs the checks and tests. --quick, as the first argument, leaves out the proofs that methods
# learn; other arguments go to pytest: bash run_tests.sh -m unit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh requirements.txt requirements-dev.txt
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
"$PYTHON" scripts/sync_shared.py
"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet .
if [ "${1:-}" = --quick ]; then set -- -m "not learn" "${@:2}"; fi
# the toys' matrices are small: two processes of one thread each do more than one of two
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest --numprocesses 2 --dist loadgroup "$@"
