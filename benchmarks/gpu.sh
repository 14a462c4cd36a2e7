#!/usr/bin/env bash
# All that is to be measured on the day a GPU is there, within 30 minutes of one H100:
#
#     benchmarks/gpu.sh [--tiny] OUT DATA [tests] [speed] [compiled] [cifar10] [stl10]
#
# DATA holds cifar-10-batches-py, or CIFAR-10 as train/CLASS/* and test/CLASS/*, and stl10_binary
# where STL-10 is wanted too.  OUT gets gpu.json, gpu.md, run folders and a log of each piece.
# A piece is a command of at most 9 minutes.  After a stop or a kill the same call goes on: what
# is done is skipped, training resumes.  LIMIT=540 ends a call after so many seconds.  MINUTES (30)
# are for all calls; a training takes what is left of them, at most 15.  PYTHON is the interpreter,
# --tiny a rehearsal without a GPU.  Exit code: 0 done, 1 a piece failed, 75 some are left.
set -u
command="benchmarks/gpu.sh $*" often=(--save-every 500 --knn-every 2500) trial=300 tiny=()
small="--crop-size 32 --stem cifar" rounds=(--rounds 3 --images 10240)
settings=("--crop-size 96 --batch-size 256" "--crop-size 96 --batch-size 1024"
    "$small --batch-size 256" "$small --batch-size 1024")
if [ "${1:-}" = --tiny ]; then
    shift
    export MINUTES=0 CUDA_VISIBLE_DEVICES='' TORCHDYNAMO_DISABLE=1
    often=(--save-every 5 --knn-every 0) trial=12 settings=("$small") rounds=(--rounds 1 --images 1)
    tiny=(--width 0.125 --byol.hidden 16 --batch-size 8 --threads 1 --log-every 5)
fi
mkdir -p "$1" && out=$(realpath "$1") && data=$(realpath "$2") && shift 2 || exit 2
wanted=" ${*:-tests speed compiled cifar10 stl10} " python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
card="no GPU" ask="--query-gpu=name,driver_version --format=csv,noheader"
[ ${#tiny[@]} = 0 ] && card=$(nvidia-smi --id=0 $ask 2>/dev/null || echo "no GPU")
trap 'exit 75' INT TERM HUP

piece() { # NAME COMMAND...: runs it unless it is done; what came of it goes to pieces.jsonl
    local name=$1 code=75 begun=$SECONDS left=$((${LIMIT:-100000} - SECONDS))
    shift
    grep -qs "\"$name\", \"code\": 0" "$out/pieces.jsonl" && return
    if [ $left -ge 30 ]; then
        echo "$name: $*"
        timeout --foreground --preserve-status --kill-after 20 $((left < 540 ? left : 540)) \
            "$@" >>"$out/$name.log" 2>&1
        code=$?
        [ $code = 143 ] && [ $left -lt 540 ] && code=75 # LIMIT has ended it
    fi
    printf '{"piece": "%s", "code": %d, "seconds": %d, "card": "%s", "command": "%s"}\n' \
        "$name" $code $((SECONDS - begun)) "$card" "$*" >>"$out/pieces.jsonl"
    return $code
}

speed() { # NAME FLAGS...: throughput in each setting; a setting is several words
    local number=0 setting
    for setting in "${settings[@]}"; do
        piece "$1$((++number))" "$python" -m benchmarks.throughput \
            "${rounds[@]}" $setting "${@:2}" "${tiny[@]}"
    done
}

train() { # NAME SHARE FLAGS...: a trial for the rate, the run in parts, linear evaluation, k-NN
    local run=("$python" train_byol.py --resume --data-root "$data" "${@:3}" "${tiny[@]}") head
    piece "$1-trial" "${run[@]}" --out "$out/$1-trial" --steps $trial || return
    piece "$1-steps" "$python" -m benchmarks.gpu steps "$out" "$1" "$2" || return
    run+=("${often[@]}" --out "$out/$1" --steps "$(cat "$out/$1.steps")")
    piece "$1" "${run[@]}" || piece "$1" "${run[@]}" || piece "$1" "${run[@]}" || return
    for head in linear knn; do
        piece "$1-$head" "$python" linear_eval.py --ckpt "$out/$1" --head $head \
            --data-root "$data" --overwrite
    done
}

tests=("$python" -m pytest -m gpu tests/test_gpu.py) folder=() share=1
"$python" -c "import pytest" 2>/dev/null || tests=(echo "pytest is not installed: skipped")
[ -d "$data/cifar-10-batches-py" ] || folder=(--dataset folder)
[[ -d $data/stl10_binary && $wanted == *" stl10 "* ]] && share=2
[[ $wanted == *" tests "* ]] && piece tests "${tests[@]}"
[[ $wanted == *" speed "* ]] && speed speed
[[ $wanted == *" compiled "* ]] && speed compiled --compile
[[ $wanted == *" cifar10 "* ]] &&
    train cifar10 $share --recipe recipes/cifar10_gpu.toml "${folder[@]}"
[ $share = 2 ] && train stl10 1 --recipe recipes/stl10.toml
"$python" -m benchmarks.gpu page "$out" "$command"
