#!/usr/bin/env bash
# Sets up what is missing and runs the checks and tests. --quick leaves out the proofs that methods
# learn; other arguments go to pytest: bash run_tests.sh -m unit
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
python=$(command -v python3 || command -v python) || { echo "$0: Python 3.11 or later is needed" >&2 && exit 2; }
exec "$python" scripts/start/set_up.py run_tests "$@"
