# Makes the environment that AURORA_DEPS names and activates it. Source it: `source scripts/setup.sh`.
#   locked (the default)  .venv         the exact versions of requirements.lock
#   latest                .venv-latest  the newest that requirements.txt allows, looked up once a day
#   oldest                .venv-oldest  the lower bounds of requirements.txt
# uv installs where it is on the path, pip elsewhere. Safe to run again (instant while nothing changed) and after an
# interrupted run. PYTHON=/path/to/python3 chooses the interpreter. `bash scripts/setup.sh --renew-lock` makes a new lock.

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

_aurora_room() {
    local free
    free=$(df -Pm . | awk 'NR == 2 {print $4}')
    if [ "$free" -lt 9000 ]; then
        _aurora_fail "only $free MB are free in $PWD; the packages take 7 GB there (2 GB with torch's CPU build)." \
            "Remedy: make room, or clone into a larger disk."
    fi
}

_aurora_make_venv() {
    # A half-made environment (interrupted before pip was there) is made anew.
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then return 0; fi
    local python log
    python=$(_aurora_find_python) || return 1
    _aurora_room
    rm -rf "$venv"
    log=$(mktemp)
    if ! "$python" -m venv "$venv" >"$log" 2>&1; then
        cat "$log" >&2
        rm -rf "$venv" "$log"
        _aurora_fail "$python cannot make a virtual environment." \
            "Remedy: apt-get install python3-venv (it brings venv and ensurepip), then run this again."
        return 1
    fi
    rm -f "$log"
}

# uv reads neither pip's configuration files nor its variables, and would pass over a company's index, certificates
# and constraints. What was told uv itself stays.
_aurora_tell_uv() {
    local told option variable section value
    told=$("$venv/bin/python" -m pip config list 2>/dev/null)
    while read -r option variable; do
        for section in :env: install global; do
            value=$(sed -n "s/^$section\.$option='\(.*\)'\$/\1/p" <<<"$told" | sed -e 's/\\n/ /g' -e 's/^ *//')
            if [ -n "$value" ]; then break; fi
        done
        if [ "$option" = find-links ]; then value=${value// /,}; fi
        if [ -n "$value" ] && [ -z "${!variable:-}" ]; then export "$variable=$value"; fi
    done <<'END'
index-url UV_DEFAULT_INDEX
extra-index-url UV_INDEX
find-links UV_FIND_LINKS
no-index UV_NO_INDEX
constraint UV_CONSTRAINT
trusted-host UV_INSECURE_HOST
cert SSL_CERT_FILE
client-cert SSL_CLIENT_CERT
proxy ALL_PROXY
END
    # As pip does it: the best version of all indexes, the system's certificates, a minute for an answer. A cache beside
    # the packages lends them its files without a copy.
    export UV_INDEX_STRATEGY=unsafe-best-match UV_SYSTEM_CERTS=1 UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-60}"
    export UV_CACHE_DIR="${UV_CACHE_DIR:-$PWD/$venv/.uv-cache}"
}

# One try; the arguments are those that both tools know.
_aurora_try() {
    if [ -n "$uv" ]; then
        "$uv" pip install --python "$venv/bin/python" --quiet "${resolution[@]}" "$@"
    else
        "$venv/bin/python" -m pip install --no-cache-dir --quiet --disable-pip-version-check --retries 5 --timeout 60 "$@"
    fi
}

_aurora_retry() {
    local attempt
    for attempt in 1 2 3; do
        if _aurora_try "$@"; then return 0; fi
        if [ "$attempt" -lt 3 ]; then
            _aurora_fail "installation failed, attempt $((attempt + 1)) of 3 in $((attempt * 5)) s"
            sleep $((attempt * 5))
        fi
    done
    _aurora_fail "could not install: $*. Remedy: see the message above (network, disk space, proxy)."
    return 1
}

# In a subshell: what it exports must not stay in the user's shell.
_aurora_install() (
    index=https://download.pytorch.org/whl/cpu
    uv=$(command -v uv) && "$uv" --version >/dev/null 2>&1 || uv=
    resolution=()
    if [ "$mode" = oldest ]; then
        # pip knows no lowest versions.
        if [ -z "$uv" ]; then _aurora_retry uv && uv=$venv/bin/uv || exit 1; fi
        resolution=(--resolution lowest-direct)
    fi
    if [ -n "$uv" ]; then _aurora_tell_uv; fi
    list=$(mktemp)
    trap 'rm -rf "$list" "$venv/.uv-cache"' EXIT
    sed -e 's/[[:space:]]*#.*//' -e '/^$/d' "$file" >"$list"
    mapfile -t pair < <(grep -E '^(torch|torchvision)[=><]' "$list")
    # torch and torchvision come first: which build they are decides about the rest. Without an NVIDIA GPU the CPU builds
    # are a tenth of the size; their index is tried first.
    if command -v nvidia-smi >/dev/null 2>&1 ||
        ! "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null ||
        ! _aurora_try --no-deps --index-url "$index" "${pair[@]}"; then
        _aurora_retry --no-deps "${pair[@]}" || exit 1
    fi
    # The lock lists the CUDA packages of PyPI's torch. A build of another index (2.14.1+cpu) needs none or others.
    if "$venv/bin/python" -c 'import importlib.metadata as m; assert "+" in m.version("torch")' 2>/dev/null; then
        sed -i -E '/^(nvidia-|cuda-|triton=)/d' "$list"
    fi
    _aurora_retry -r "$list"
)

_aurora_setup() {
    local mode=${AURORA_DEPS:-locked} venv file=requirements.txt key
    case $mode in
        locked) venv=.venv file=requirements.lock ;;
        latest | oldest) venv=.venv-$mode ;;
        *)
            _aurora_fail "AURORA_DEPS is '$mode'. Remedy: locked, latest or oldest."
            return 1
            ;;
    esac
    key=$(cat "$file" scripts/setup.sh | cksum | tr -d ' ')
    if [ "$mode" = latest ]; then key=$key-$(date +%F); fi
    if [ ! -e "$venv/.installed-$key" ]; then
        # An installer keeps what is there and within the range, so these two start from nothing.
        if [ "$mode" != locked ] && [ ! -e "$venv/.begun-$key" ]; then rm -rf "$venv"; fi
        _aurora_make_venv || return 1
        touch "$venv/.begun-$key"
        echo "setup: installing $file ($mode) into $venv (a minute with uv, several with pip)"
        _aurora_install || return 1
        XDG_CACHE_HOME=$venv XDG_CONFIG_HOME=$venv "$venv/bin/python" scripts/check_environment.py || return 1
        rm -f "$venv"/.installed-*
        touch "$venv/.installed-$key"
    fi
    # shellcheck disable=SC1090
    source "$venv/bin/activate"
}

# One version of torch for every machine: some cap it there. No hashes: the CPU and CUDA builds of a version differ.
_aurora_renew_lock() {
    uv pip compile --universal --upgrade --python-version 3.10 --quiet --no-annotate \
        --custom-compile-command "bash scripts/setup.sh --renew-lock" --output-file requirements.lock \
        --constraints <(printf 'torch==2.14.1\ntorchvision==0.29.1\n') requirements.txt
}

if [ "${BASH_SOURCE[0]}" = "$0" ] && [ "${1:-}" = --renew-lock ]; then _aurora_renew_lock; else _aurora_setup; fi
