# Sourced by the other scripts: sets $ROOT (the repository) and $PYTHON (of $ROOT/.venv, which is made
# if it is missing), and installs requirement files of the repository unless that has been done.
#
#     . "$(dirname "$0")/setup.sh" requirements.txt [MORE ...]
#
# Written for bash 3.2, so that macOS can run it.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer was not found; install it or set PYTHON=/path/to/python" >&2
    return 1
}

setup_environment() {
    local base file files options
    if ! "$ROOT/.venv/bin/python" -m pip --version > /dev/null 2>&1; then
        base=$(find_python)
        echo "making .venv with $("$base" --version)"
        if ! "$base" -m venv --clear "$ROOT/.venv"; then
            echo "error: no virtual environment could be made; on Debian and Ubuntu install" \
                "python3-venv first" >&2
            return 1
        fi
    fi
    PYTHON=$ROOT/.venv/bin/python
    for file in "$@"; do
        files+=("$ROOT/$file")
        options+=(-r "$ROOT/$file")
    done
    # What has been installed, so that the next start takes no time.
    if ! cat "${files[@]}" | cmp -s - "$ROOT/.venv/installed-$#.txt"; then
        echo "installing $* (torch with CUDA is several GB; once)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "${options[@]}"
        cat "${files[@]}" > "$ROOT/.venv/installed-$#.txt"
    fi
}

setup_environment "$@"
