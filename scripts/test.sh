#!/usr/bin/env bash
# The whole test suite, from a fresh clone: makes .venv, installs what is missing, lints, runs pytest.
#
#     bash scripts/test.sh                    everything (CPU, no network beyond the package index)
#     bash scripts/test.sh -m "not long"      without kills, several processes, fuzzing, end to end
#     bash scripts/test.sh -m gpu             what needs a GPU
set -euo pipefail
. "$(dirname "$0")/setup.sh" requirements.txt scripts/requirements.txt tests/requirements.txt
cd "$ROOT"
# Two test processes on two cores: threads of one would wait for those of the other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -n 2 --dist worksteal -m "" "$@"
