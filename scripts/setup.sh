# Makes .venv if it is missing and installs the package into it. Sourced by the other scripts: setup.sh [EXTRA]
#
# Versions are pinned by constraints.txt, torch first of all: an unpinned torch would take gigabytes of CUDA.
# PRETRAIN_USE_SYSTEM_TORCH=1 keeps the torch that is already installed (containers, ROCm).

setup() {
    local extra="${1:-}" target="." constraints="constraints.txt" flags=()
    [ -n "$extra" ] && target=".[$extra]"
    if [ ! -x .venv/bin/python ]; then
        local python
        for python in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
            [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
            python=""
        done
        if [ -z "$python" ]; then
            echo "Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python bash $0" >&2
            return 1
        fi
        [ -n "${PRETRAIN_USE_SYSTEM_TORCH:-}" ] && flags+=(--system-site-packages)
        "$python" -m venv "${flags[@]}" .venv || return 1
    fi
    local stamp wanted
    stamp=".venv/.installed-${extra:-base}"
    wanted="$(cat pyproject.toml constraints.txt | sha256sum)${PRETRAIN_USE_SYSTEM_TORCH:-}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into .venv (once)"
        if [ -n "${PRETRAIN_USE_SYSTEM_TORCH:-}" ]; then
            local torch
            torch="$(.venv/bin/python -c 'import torch; print(torch.__version__)')" || return 1
            echo "keeping torch $torch"
            constraints=".venv/constraints.txt"
            { grep -v '^torch==' constraints.txt; echo "torch==$torch"; } > "$constraints"
        else
            .venv/bin/python -m pip install -q -c "$constraints" torch || return 1
        fi
        .venv/bin/python -m pip install -q -c "$constraints" -e "$target" || return 1
        echo "$wanted" > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
