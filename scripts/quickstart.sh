#!/usr/bin/env bash
# The main job on a fresh machine: pretrain, evaluate and measure three encoders, print one table.
#
#     bash scripts/quickstart.sh                 on the built-in toy dataset; minutes on two CPU cores
#     bash scripts/quickstart.sh --data DIR      on your images, DIR/{train,val}/CLASS/IMAGE
#
# Re-running reuses what is there. `bash scripts/quickstart.sh --help` lists the rest.
set -euo pipefail
. "$(dirname "$0")/setup.sh" requirements.txt
exec "$PYTHON" "$ROOT/scripts/quickstart.py" "$@"
