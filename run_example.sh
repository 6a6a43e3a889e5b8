#!/bin/sh
# Trains, meta-trains and evaluates on the text inside Python; arguments go to train.py.
set -eu
cd "$(dirname "$0")"
sh set_up.sh
exec "${METALM_VENV:-.venv}/bin/python" train.py "$@"
