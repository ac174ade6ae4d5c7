#!/usr/bin/env bash
# Sets everything up, lints and runs all tests. Arguments go to pytest (e.g. `bash scripts/test.sh -k splice`).
#   bash scripts/test.sh --smoke                              only what touches the interfaces of other packages
#   AURORA_DEPS=locked|latest|oldest bash scripts/test.sh     with other versions of them (scripts/setup.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
if [ "${1:-}" = --smoke ]; then set -- -m smoke "${@:2}"; fi

# What the packages keep for the next time (compiled kernels, font lists) would land in the user's home.
scratch=$(mktemp -d "${TMPDIR:-/tmp}/aurora-test.XXXXXX")
tidy() {
    local status=$? left
    unset XDG_CACHE_HOME
    # Every process that a test started carries the variable. Ten seconds for those that are about to end.
    for _ in {1..20}; do
        left=$(grep -lsF "XDG_CACHE_HOME=$scratch" /proc/[0-9]*/environ | cut -d / -f 3) || true
        if [ -z "$left" ]; then break; fi
        sleep 0.5
    done
    if [ -n "$left" ]; then
        echo "test: these processes were left behind and are ended now:" >&2
        for pid in $left; do echo "  $pid $(tr '\0' ' ' <"/proc/$pid/cmdline")" >&2; done
        # shellcheck disable=SC2086 - one argument per process
        kill -KILL $left 2>/dev/null || true
        status=1
    fi
    rm -rf "$scratch"
    exit "$status"
}
trap tidy EXIT
export XDG_CACHE_HOME="$scratch" XDG_CONFIG_HOME="$scratch" TRITON_HOME="$scratch" MPLCONFIGDIR="$scratch"

# Two test processes of one thread each: more threads would contend for the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
echo "test: $(nproc --all) cores, $(df -Pm "${TMPDIR:-/tmp}" | awk 'NR == 2 {print $4}') MB free in ${TMPDIR:-/tmp}"
python -c 'import importlib.metadata as m, platform; print("test: Python", platform.python_version(), *(
    f"{p} {m.version(p)}" for p in "torch torchvision transformers deepspeed peft numpy".split()), sep=", ")'
without_browser=()
if [ -z "${CI:-}${CHROMIUM:-}" ] && ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "test: no Chromium here, so the report's page is not looked at (tests/test_report_browser.py;" \
        "remedy: apt-get install chromium)"
    without_browser=(--ignore tests/test_report_browser.py)
fi
ruff check .
# After twenty failures the cause is the machine; going on would hide it for an hour.
python -m pytest -n 2 --dist worksteal --maxfail=20 "${without_browser[@]}" "$@"
