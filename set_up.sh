#!/bin/sh
# Makes the environment that run_example.sh and run_tests.sh work in; does nothing if it is ready.
#
#     sh set_up.sh          # what the programs need
#     sh set_up.sh dev      # and what the tests need
#
# METALM_VENV names another folder than .venv; PYTHON another interpreter than python3.
set -eu
cd "$(dirname "$0")"

extra=${1:-}
environment=${METALM_VENV:-.venv}
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! "$environment/bin/python" -m pip --version > /dev/null 2>&1; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "metalm needs Python 3.10 or newer, found $("$python" --version 2>&1);" \
            "name another with PYTHON=..." >&2
        exit 1
    fi
    "$python" -m venv --clear "$environment"
fi

# Ready means: this folder, these requirements.
wanted=$(pwd; cat pyproject.toml constraints.txt)
ready() { [ -f "$environment/ready$1" ] && [ "$wanted" = "$(cat "$environment/ready$1")" ]; }
if ! ready "-$extra" && ! ready -dev; then
    echo "installing into $environment; this takes some minutes the first time" >&2
    "$environment/bin/python" -m pip install --quiet \
        --constraint constraints.txt --editable ".${extra:+[$extra]}"
    printf '%s\n' "$wanted" > "$environment/ready-$extra"
fi
