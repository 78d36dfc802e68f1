#!/usr/bin/env bash
# All that a GPU is wanted for in 9 minutes, the most valuable first; a short table comes last.
#
#     benchmarks/on_gpu.sh RESULTS DATA          # DATA as for --dataset imagefolder
#     benchmarks/on_gpu.sh RESULTS DATA small    # tiny networks, to try this script
#
# Each part is cut off by its own time limit. RESULTS gets log.txt, the figures of the benchmark, and
# metrics and genotypes of the searches.
set -u
results=$(realpath -m "$1") data=$(realpath -m "$2") sizes=() small=()
if [ "${3:-}" = small ]; then
    sizes=(--init_channels 2 --layers 3) small=(--small)
fi
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
work=$(mktemp -d) log=$results/log.txt
mkdir -p "$results"
: >"$log"

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name" >>"$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1 </dev/null  # no pipe: workers may outlive a command
    echo "$name: exit status $? after $((SECONDS - began)) s (124: cut off)"
    sed "1,/^== $name\$/d" "$log" >"$work/$name.txt"
}

bench() {  # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" python3 benchmarks/bench.py --device cuda --quick "${small[@]}" \
        --out "$results/$name.json" "$@"
}

search() {  # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" python3 search.py --device cuda --dataset imagefolder --data "$data" \
        --workers 8 --distinct_edges --save "$work/$name" "${sizes[@]}" "$@"
    for rows in metrics genotypes; do
        cp "$work/$name/$rows.jsonl" "$results/$name-$rows.jsonl" 2>/dev/null
    done
}

part check 80 python3 benchmarks/check_gpu.py
bench channels-last 100 --layout channels-last
bench nchw 100 --layout nchw
bench compiled 110 --kinds retraining two-stage one-stage --forms compiled
search two-stage 100
search one-stage 45 --one_stage

echo
grep FAILED "$work/check.txt"
tail -n 1 "$work/check.txt"
for name in channels-last nchw compiled; do
    tail -n +2 "$work/$name.txt" | cut -c1-100
done
for name in two-stage one-stage; do
    grep -E "^ +epoch|^ +[0-9]+/|^ +search [0-9]+" "$work/$name.txt" | sed -n '1,2p;3,${$p}'
done
rm -rf "$work"
