#!/usr/bin/env bash
# Run all checks and measurements that need a GPU in 9 minutes, the most important ones first.
#
#     benchmarks/on_gpu.sh RESULTS DATA          # DATA as for --dataset imagefolder
#     benchmarks/on_gpu.sh RESULTS DATA small    # tiny networks, to test this script
#
# Each part has a time limit. RESULTS gets the output of each part, the figures of the benchmarks,
# and the metrics and genotypes of the searches. A summary is printed at the end.
set -u
results=$(realpath -m "$1") data=$(realpath -m "$2") sizes=() small=()
if [ "${3:-}" = small ]; then
    sizes=(--init_channels 2 --layers 3) small=(--small)
fi
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
work=$(mktemp -d)
mkdir -p "$results"

part() {  # NAME SECONDS SCRIPT FLAGS...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    # A file instead of a pipe, because data workers may outlive the command.
    timeout -k 5 "$limit" python3 "$@" >"$results/$name.txt" 2>&1 </dev/null
    echo "$name: exit status $? after $((SECONDS - start)) s (124: time limit)"
}

bench() {  # NAME SECONDS FLAGS...
    part "$1" "$2" benchmarks/bench.py --device cuda --quick "${small[@]}" \
        --out "$results/$1.json" "${@:3}"
}

search() {  # NAME SECONDS FLAGS...
    part "$1" "$2" search.py --device cuda --dataset imagefolder --data "$data" --workers 8 \
        --distinct_edges --save "$work/$1" "${sizes[@]}" "${@:3}"
    for rows in metrics genotypes; do
        cp "$work/$1/$rows.jsonl" "$results/$1-$rows.jsonl" 2>/dev/null
    done
}

part check 80 benchmarks/check_gpu.py
bench channels-last 100 --layout channels-last
bench nchw 100 --layout nchw
bench compiled 110 --kinds retraining two-stage one-stage --forms compiled
search two-stage 100
search one-stage 45 --one_stage

echo
grep FAILED "$results/check.txt"
tail -n 1 "$results/check.txt"
for name in channels-last nchw compiled; do
    tail -n +2 "$results/$name.txt" | cut -c1-100
done
for name in two-stage one-stage; do
    grep -E "^ +epoch|^ +[0-9]+/|^ +search [0-9]+" "$results/$name.txt" | sed -n '1,2p;3,${$p}'
done
rm -rf "$work"
