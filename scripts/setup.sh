# Makes .venv with everything in requirements.txt and activates it. Source it: `source scripts/setup.sh`.
# Safe to run again (instant while requirements.txt is unchanged) and after an interrupted run.
# PYTHON=/path/to/python3 chooses the interpreter.

_aurora_fail() { printf 'setup: %s\n' "$*" >&2; }

_aurora_find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.10 python3.13; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    _aurora_fail "Python 3.10 or newer was not found (python3 is $(python3 --version 2>&1))." \
        "Remedy: install one (Debian, Ubuntu: apt-get install python3 python3-venv), or set PYTHON=/path/to/python3."
    return 1
}

_aurora_make_venv() {
    # A half-made environment (interrupted before pip was there) is made anew.
    if [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then return 0; fi
    local python log
    python=$(_aurora_find_python) || return 1
    rm -rf .venv
    log=$(mktemp)
    if ! "$python" -m venv .venv >"$log" 2>&1; then
        cat "$log" >&2
        rm -rf .venv "$log"
        _aurora_fail "$python cannot make a virtual environment." \
            "Remedy: apt-get install python3-venv (it brings venv and ensurepip), then run this again."
        return 1
    fi
    rm -f "$log"
}

_aurora_pip() {
    local attempt
    for attempt in 1 2 3; do
        if .venv/bin/python -m pip install --no-cache-dir --quiet --disable-pip-version-check \
            --retries 5 --timeout 60 "$@"; then return 0; fi
        if [ "$attempt" -lt 3 ]; then
            _aurora_fail "installation failed, attempt $((attempt + 1)) of 3 in $((attempt * 5)) s"
            sleep $((attempt * 5))
        fi
    done
    _aurora_fail "pip could not install: $*. Remedy: see pip's message above (network, disk space, proxy)."
    return 1
}

# torch and torchvision in one command, or their versions may not match. Without an NVIDIA GPU the CPU builds are a
# tenth of the size; their index is tried first.
_aurora_install_torch() {
    local index=https://download.pytorch.org/whl/cpu
    if ! command -v nvidia-smi >/dev/null 2>&1 && ! .venv/bin/python -c 'import torch, torchvision' 2>/dev/null; then
        if .venv/bin/python -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
            if .venv/bin/python -m pip install --no-cache-dir --quiet --disable-pip-version-check \
                --index-url "$index" "$@"; then return 0; fi
            _aurora_fail "the CPU builds could not be installed; the default index is used"
        fi
    fi
    _aurora_pip "$@"
}

_aurora_room() {
    local free
    free=$(df -Pm . | awk 'NR == 2 {print $4}')
    if [ "$free" -lt 9000 ]; then
        _aurora_fail "only $free MB are free in $PWD; the packages take 7 GB there (2 GB with torch's CPU build)." \
            "Remedy: make room, or clone into a larger disk."
    fi
}

_aurora_setup() {
    local stamp key pair others
    key=$(cat requirements.txt scripts/setup.sh | cksum | tr -d ' ')
    stamp=.venv/.installed-$key
    if [ ! -e "$stamp" ]; then
        [ -e .venv/bin/python ] || _aurora_room
        _aurora_make_venv || return 1
        echo "setup: installing requirements.txt into .venv (several minutes the first time)"
        pair=$(sed -e 's/[[:space:]]*#.*//' -e '/^$/d' requirements.txt | grep -E '^(torch|torchvision)[^a-z-]')
        others=$(mktemp)
        sed -e 's/[[:space:]]*#.*//' -e '/^$/d' requirements.txt >"$others"
        # Whoever took the headless build for want of libGL keeps it: both packages own the same files.
        if .venv/bin/python -m pip show --quiet opencv-python-headless 2>/dev/null; then
            sed -i '/^opencv-python[^-]/d' "$others"
        fi
        # shellcheck disable=SC2086 - one argument per requirement
        _aurora_install_torch $pair && _aurora_pip -r "$others" || { rm -f "$others"; return 1; }
        rm -f "$others"
        .venv/bin/python scripts/check_environment.py || return 1
        rm -f .venv/.installed-*
        touch "$stamp"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
}

_aurora_setup
