# Sourced by the run_*.sh wrappers with the requirements files that they need; leaves a Python that has them in $PYTHON.
# An active virtual or conda environment that has the packages is used as it is; else .venv is made, and filled once.

if [ -f .env ]; then
  set -a
  # shellcheck disable=SC1091
  source .env
  set +a
fi

active_env_has() { # requirements files
  [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ] || return 1
  python - "$@" 2>/dev/null <<'PY'
import importlib.metadata, re, sys
for file in sys.argv[1:]:
    for line in open(file):
        name = re.split(r"[=<>!\[ #;]", line.strip(), maxsplit=1)[0]
        if name:
            importlib.metadata.version(name)
PY
}

fill_venv() { # requirements files
  local file stamp base
  PYTHON="$PWD/.venv/bin/python"
  for file in "$@"; do
    stamp=".venv/.ready-$(basename "$file")"
    if [ -f "$stamp" ] && [ ! "$file" -nt "$stamp" ]; then continue; fi
    base=$(command -v python3 || command -v python) || { echo "Python 3.11 or later is needed" >&2; exit 1; }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; found $("$base" --version)" >&2; exit 1; }
    echo "setting up: installing $file into .venv (once; some minutes)"
    [ -x "$PYTHON" ] || "$base" -m venv .venv
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$file"
    touch "$stamp"
  done
}

if active_env_has "$@"; then PYTHON=python; else fill_venv "$@"; fi
