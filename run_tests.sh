#!/bin/sh
# Style, types and tests; arguments go to pytest (for instance: -m slow, or tests/meta).
set -eu
cd "$(dirname "$0")"
sh set_up.sh dev
bin="${METALM_VENV:-.venv}/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest --numprocesses auto --maxprocesses 4 "$@"
