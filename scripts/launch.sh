# Sourced by launch scripts: sets $ROOT (the repository) and $PYTHON (of $ROOT/.venv, if it is there).
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -x "$ROOT/.venv/bin/python" ] && PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
PYTHON=${PYTHON:-python3}

# pretrain FLAGS ... -- DIR [MORE FLAGS ...]: uses all visible GPUs of this node. Cut off and started
# again it goes on from its last checkpoint.
pretrain() {
    local name data flags=()
    name=$(basename "$0" .sh)
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    data=${1:?usage: bash scripts/$name.sh DIR [MORE FLAGS ...]}
    shift
    exec "$PYTHON" "$ROOT/main_moco.py" "${flags[@]}" \
        --save-dir "${OUT:-results/$name}" --resume auto "$@" "$data"
}
