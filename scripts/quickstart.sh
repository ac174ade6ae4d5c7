#!/usr/bin/env bash
# The whole pipeline on the mini world from nothing: environment, data, teacher, SFT, mining and correction, reflective
# SFT, GRPO, evaluations, report.
#   bash scripts/quickstart.sh [--num_gpus 2] [--seed 0] [--out runs/quickstart] [--full]
#
# --num_gpus N  processes of a training, on a CPU too     --full  also SFT without reasoning, SFT without null rows
#
# Every step is one of the public commands. A step that is done is skipped and an interrupted one continues, so this may
# be started again at any time; another seed, number of processes or code makes everything anew. Without a GPU,
# evaluations run beside a training in one process, and their output goes to <out>/steps/<step>.log.
# Results: <out>/summary.json (percent, protocol official; the other protocol under "per_expression"), <out>/index.html.
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=1 seed=0 out=runs/quickstart full=
while [ $# -gt 0 ]; do
    case $1 in
        --full) full=--full && shift && continue ;;
        --num_gpus=* | --seed=* | --out=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --num_gpus | --seed | --out) ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
        *) echo "quickstart: unknown argument $1 (see --help)" >&2 && exit 2 ;;
    esac
    case $1:${2-} in
        --out:?*) out=$2 ;;
        --num_gpus:*[!0-9]* | --seed:*[!0-9]* | --*:) echo "quickstart: $1 needs a value" >&2 && exit 2 ;;
        --num_gpus:*) gpus=$2 ;;
        --seed:*) seed=$2 ;;
    esac
    shift 2
done
if [ "$gpus" -lt 1 ] || [ $((12 % gpus)) -ne 0 ]; then
    echo "quickstart: --num_gpus $gpus must divide 12, the smallest batch (configs/mini/grpo.yaml)" >&2
    exit 2
fi
source scripts/setup.sh
mkdir -p "$out/steps"

# Every command inherits this lock, so that nothing is started while one that outlived its parent still writes.
exec 9>"$out/.lock"
flock -n 9 || { echo "quickstart: waiting for what an earlier one left running in $out" && flock 9; }

read_files=$(find dataset model configs/mini assets/mini_base train_ds*.py -type f ! -name '*.pyc' | LC_ALL=C sort
    ls utils/{types,answers,engine,evaluation,metrics,scoring}.py \
        scripts/{make_mini_world,mine_failures,correct_paths,build_reflective,analyze_failures}.py)
key=$({ echo "$seed $gpus" && xargs cat <<<"$read_files"; } | sha256sum | cut -c 1-16)
export OMP_NUM_THREADS=1

# A line of its own, where the progress bar of a training may stand.
say() { if [ -t 1 ]; then printf '\r\033[K%s\n' "$*"; else printf '%s\n' "$*"; fi; }

# step NAME OUTPUT COMMAND...: a stamp holds the key, and once the command is done its begin and end.
step() {
    local name=$1 output=$2 stamp=$out/steps/$1 began
    shift 2
    if [ -e "$output" ] && [ "$(head -n 1 "$stamp")" = "$key" ] && [ "$(wc -l <"$stamp")" -eq 2 ]; then
        say "== $name: done before"
        return
    fi 2>/dev/null
    if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$key" ]; then rm -rf "${out:?}/$name"; fi # nothing old is mixed in
    echo "$key" >"$stamp"
    say "== $name: $*"
    began=$(date +%s.%N)
    if ! "$@" >&"${shown:-1}" 2>&"${shown:-2}" || [ ! -e "$output" ]; then
        say "quickstart: step $name failed or left no $output; see its message${shown:+ in $out/steps/$name.log}"
        return 1
    fi
    echo "$began $(date +%s.%N)" >>"$stamp"
    say "== $name: done in $(awk -v b="$began" -v e="$(date +%s.%N)" 'BEGIN {printf "%d", e - b}') s"
}

# Each step has a process group of its own (set -m), so that it can be ended whole.
front= besides=
end() { for child in $front $besides; do kill -- "-$child" 2>/dev/null || true; done; }
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run() {
    set -m
    step "$@" &
    set +m
    front=$!
    wait "$front"
    front=
}
# Beside a training, one after the other; in front where there is a GPU, or where a training has several processes.
beside() {
    if [ -n "$alone" ]; then
        run "$@"
        return
    fi
    set -m
    (exec 8>"$out/steps/.beside" && flock 8 && shown=7 step "$@" 7>"$out/steps/$1.log") &
    set +m
    besides="$besides $!"
}
together() {
    for child in $besides; do wait "$child"; done
    besides=
}

processes() { if [ "$1" -gt 1 ]; then echo "-m torch.distributed.run --standalone --nproc-per-node $1"; fi; }
cores=$(env -u OMP_NUM_THREADS nproc) alone=
if [ "$gpus" -gt 1 ] || [ "$cores" -lt 2 ] || command -v nvidia-smi >/dev/null; then alone=yes; fi
several=$((cores < 4 ? cores : 4)) # of what nothing can run beside
if [ -n "$alone" ]; then several=$gpus; fi

train() { # NAME CONFIG BATCH [OVERRIDE...]
    # shellcheck disable=SC2046 - words
    run "$1" "$out/$1/final/config.yaml" python $(processes "$gpus") train_ds.py --config "configs/mini/$2.yaml" \
        output_dir="$out/$1" seed="$seed" engine.micro_batch=$(($3 / gpus)) "${@:4}"
}
evaluate() { # run|beside PROCESSES NAME STAGE "SPLITS" LAST [OVERRIDE...]
    # shellcheck disable=SC2046
    "$1" "$3" "$out/$3/$6/metrics.json" python $(processes "$2") train_ds_test.py --config configs/mini/eval.yaml \
        output_dir="$out/$3" seed="$seed" eval.output_dir="$out/$3" eval.checkpoint="$out/$4/final" \
        eval.splits="[$5]" "${@:7}"
}

teacher=sft.teacher_checkpoint=$out/teacher/final
began=$SECONDS
run world data/mini/metadata.csv python scripts/make_mini_world.py --out data/mini
train teacher teacher 24
evaluate beside "$gpus" eval_teacher teacher test_s,test_u test_u eval.pictures=0 "data.cot=[data/mini/cot/held_out.jsonl]"
train sft sft 24 "$teacher"
together
# shellcheck disable=SC2046
run mine "$out/mine/failures.jsonl" python $(processes "$several") scripts/mine_failures.py \
    --config configs/mini/eval.yaml --checkpoint "$out/sft/final" --out "$out/mine/failures.jsonl" eval.limit=1500
run correct "$out/correct/corrections.jsonl" python scripts/correct_paths.py --data data/mini \
    --failures "$out/mine/failures.jsonl" --out "$out/correct/corrections.jsonl" --backend mini
run compose "$out/compose/reflective.jsonl" python scripts/build_reflective.py \
    --corrections "$out/correct/corrections.jsonl" --out "$out/compose/reflective.jsonl"
evaluate beside "$gpus" eval_sft sft test_s,test_u,test_n test_n eval.pictures=12
evaluate beside "$gpus" eval_sft_shuffle_audio sft test_s test_s eval.pictures=0 eval.probe=shuffle_audio
evaluate beside "$gpus" eval_sft_shuffle_video sft test_s test_s eval.pictures=0 eval.probe=shuffle_video
beside taxonomy "$out/taxonomy/types.jsonl" python scripts/analyze_failures.py --data data/mini \
    --failures "$out/mine/failures.jsonl" --out "$out/taxonomy/types.jsonl"
train reflective reflective 24 init_from="$out/sft/final" "reflective.paths=[$out/compose/reflective.jsonl]"
evaluate beside "$gpus" eval_reflective reflective test_s,test_u,test_n test_n eval.pictures=0
train grpo grpo 12 init_from="$out/reflective/final"
if [ -n "$full" ]; then
    train sft_plain sft 24 "$teacher" data.answer=plain
    evaluate beside "$gpus" eval_sft_plain sft_plain test_s,test_u test_u eval.pictures=0
    train sft_without_null sft 24 "$teacher" data.null_rows=false
    evaluate beside "$gpus" eval_sft_without_null sft_without_null test_s,test_n test_n eval.pictures=0
fi
together
evaluate run "$several" eval_grpo grpo test_s,test_u,test_n test_n eval.pictures=12
python scripts/summarise.py --out "$out" --seed "$seed" --num_gpus "$gpus" $full
echo "$((SECONDS - began)) s: $out/summary.json, $out/index.html"
