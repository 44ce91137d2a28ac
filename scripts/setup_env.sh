# Sourced by the run_*.sh wrappers: leaves a Python with the project's packages in $PYTHON.
# An active virtual or conda environment that has the packages is used as it is; else .venv is made, once.
# Usage: source scripts/setup_env.sh [requirements file …]; the first call's work is marked in .venv/.ready-NAME.

if [ -f .env ]; then
  set -a
  # shellcheck disable=SC1091
  source .env
  set +a
fi

has_packages() { # python, requirements file: whether every pinned package is there, without importing any
  "$1" - "$2" <<'PY' 2>/dev/null
import importlib.metadata as m, re, sys
for line in open(sys.argv[1]):
    name = re.split(r"[=<>!\[ #;]", line.strip(), maxsplit=1)[0]
    if name and not line.startswith(("#", "-")):
        m.version(name)
PY
}

set_up() { # requirements file
  local stamp
  stamp=".venv/.ready-$(basename "$1")"
  if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ] && has_packages python "$1"; then
    PYTHON=python
    return
  fi
  PYTHON="$PWD/.venv/bin/python"
  if [ -f "$stamp" ] && [ ! "$1" -nt "$stamp" ]; then return; fi
  local base=python3
  command -v python3 >/dev/null || base=python
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; found $("$base" --version)" >&2; exit 1; }
  echo "setting up: installing $1 into .venv (once; some minutes)"
  [ -x "$PYTHON" ] || "$base" -m venv .venv
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
  touch "$stamp"
}

for requirements in "${@:-requirements.txt}"; do set_up "$requirements"; done
