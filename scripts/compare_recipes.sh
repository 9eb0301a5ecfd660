#!/usr/bin/env bash
# Trains the same small Llama with every recipe, on the same batches from the same initial weights, and compares the losses.
#
#   scripts/compare_recipes.sh TRAIN VAL [OUT]        TRAIN, VAL: GPT-2 token files; OUT: default out/compare
#
# The setting: llama:30M, sequence 512, 128 sequences a step, 1602 steps (105M tokens), AdamW .9/.95, weight decay .1, clip 1, peak 1.2e-3,
# 10 % warm-up, cosine to 10 %. All recipes of the first seed are trained, then all of the second. scripts/plot_recipes.py then writes
#   OUT/results.csv      a row a run: losses, gaps to bf16 of the same seed, speed
#   OUT/curves/          the training loss of each run, thinned
#   OUT/summary.md, OUT/comparison.svg      over the seeds
# Runs that are finished (their row is in results.csv; nothing else of them need be kept) are not repeated; one that was stopped goes on
# where it stopped.
#
# A recipe is a row of the table, with more words behind + signs and, if you like, a name before a colon:
#   nvfp4+no-tail    tetrajet2+osci-reset+outcontrol    quartet2+tail=1    mine:fqt+fprop.scale=four_six+--bf16-from=0.9
# FIELD=VALUE is for --set, --OPTION=VALUE for any other option of ./train_fp4.
#
#   RECIPES="bf16 nvfp4 ..."  SEEDS="1 2"     what is trained
#   GPUS="0 1"                these GPUs work side by side, each on a run of its own
#   STOP_AFTER=540            after so many seconds no run is started, and those in progress save and stop
#   STEPS=1602  MODEL=llama:30M  SEQ=512  TOTAL_BATCH=128 (sequences a step)  BATCH=128 (of them in a micro-batch)  VAL_BATCHES=20 (of a step's size)
#   SAVE_EVERY=0              checkpoints against power cuts; a stopped run saves anyway
#   EXTRA="--lr 1e-3"         more options, for every run
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: scripts/compare_recipes.sh TRAIN VAL [OUT]" >&2; exit 2; }
train=$(realpath -m "$1") val=$(realpath -m "$2")
out=$(realpath -m "${3:-out/compare}")
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1}"
read -ra gpus <<< "${GPUS:-}"
read -ra extra <<< "${EXTRA:-}"
all="bf16 fp8 nvfp4 nvfp4-46 tetrajet2 quartet2 best quartet quartet-v4 fp4-dge fqt tetrajet tetrajet2+osci-reset tetrajet2+outcontrol nvfp4+no-tail"
read -ra recipes <<< "${RECIPES:-$all}"
steps=${STEPS:-1602} seq=${SEQ:-512} total=${TOTAL_BATCH:-128} batch=${BATCH:-128}
common=(--model "${MODEL:-llama:30M}" --batch "$batch" --seq "$seq" --total-batch $((total * seq)) --steps "$steps" --lr 1.2e-3
  --min-lr 0.1 --val-every 0 --val-batches $((${VAL_BATCHES:-20} * total / batch)) --sample-length 0 --save-every "${SAVE_EVERY:-0}" --keep-checkpoints 1
  "${extra[@]}")
[ -x ./train_fp4 ] || make train_fp4
mkdir -p "$out"

# One directory, one setting: other runs would not be comparable.
setting="$(basename "$train") $(basename "$val") ${common[*]}"
if [ -f "$out/setting.txt" ] && [ "$(cat "$out/setting.txt")" != "$setting" ]; then
  echo "error: $out was begun with another setting (setting.txt); choose another OUT" >&2
  exit 2
fi
echo "$setting" > "$out/setting.txt"

options_of() {                                     # "mine:nvfp4+no-tail" -> one word of the command line a line
  local words word
  IFS=+ read -ra words <<< "${1#*:}"
  printf '%s\n' --recipe "${words[0]}"
  for word in "${words[@]:1}"; do
    case $word in
      osci-reset | q-ema | q-ramping) printf '%s\n' --oscillation "$word" ;;
      outcontrol | occ) printf '%s\n' --outliers "$word" ;;
      no-tail) printf '%s\n' --bf16-last 0 ;;
      tail=*) printf '%s\n' --bf16-last "${word#tail=}" ;;
      --*=*) echo "$word" ;;
      *=*) printf '%s\n' --set "${word#set:}" ;;
      *)
        echo "error: $1: '$word' is none of osci-reset, q-ema, q-ramping, outcontrol, occ, no-tail, tail=N, FIELD=VALUE, --OPTION=VALUE" >&2
        exit 2
        ;;
    esac
  done
}
is_finished() {                                    # name, seed
  [ -f "$out/$1-$2/done" ] && return
  [ -f "$out/results.csv" ] && awk -F, -v r="$1" -v s="$2" '$1 == r && $2 == s { found = 1 } END { exit !found }' "$out/results.csv"
}
for recipe in "${recipes[@]}"; do options_of "$recipe" > /dev/null; done

# Trains one run on one GPU (empty: whichever the program takes), for at most so many seconds (0: to its end).
run() {
  local recipe=$1 seed=$2 gpu=$3 seconds=$4 name=${1%%:*}-$2 code=0 options resume=()
  local dir=$out/$name
  mapfile -t options < <(options_of "$recipe")
  compgen -G "$dir/step_*" > /dev/null && resume=(--resume)
  [ -z "$gpu" ] || export CUDA_VISIBLE_DEVICES=$gpu
  mkdir -p "$dir"
  # SIGTERM is what Ctrl-C is to the trainer: it finishes the step, saves and exits with 130.
  timeout --foreground --preserve-status -s TERM "$seconds" ./train_fp4 --train "$train" --val "$val" \
    "${common[@]}" "${options[@]}" --seed "$seed" --out "$dir" "${resume[@]}" >> "$dir.txt" 2>&1 || code=$?
  case $code in
    0) rm -rf "$dir"/step_*; printf '%s\n' "${options[*]}" > "$dir/done"; echo "== $name: $(grep 'val loss' "$dir.txt" | tail -n 1)" ;;
    124 | 130 | 143) echo "== $name: stopped, to be continued" ;;
    *) echo "== $name failed, exit $code; see $dir.txt" >&2; tail -n 3 "$dir.txt" >&2; touch "$out/.failed" ;;
  esac
}
summarize() { python3 scripts/plot_recipes.py "$out"; }

# A pipe holds the names of idle GPUs: a run takes one out and puts it back.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec 9<> "$pipe"
rm "$pipe"
[ ${#gpus[@]} -gt 0 ] || gpus=("")
printf '%s\n' "${gpus[@]}" >&9
rm -f "$out/.failed"
seconds_left() { [ -z "${STOP_AFTER:-}" ] && echo 0 || echo $((STOP_AFTER > SECONDS ? STOP_AFTER - SECONDS : -1)); }
trap 'wait; summarize; exit 130' INT TERM           # the trainers have had the same Ctrl-C, and save
left_over=0
for seed in "${seeds[@]}"; do for recipe in "${recipes[@]}"; do
  name=${recipe%%:*}-$seed
  is_finished "${recipe%%:*}" "$seed" && continue
  while ! read -r -t 1 -u 9 gpu; do :; done
  left=$(seconds_left)
  if [ "$left" = -1 ]; then echo "$gpu" >&9; left_over=$((left_over + 1)); continue; fi
  echo "== $name${gpu:+ on GPU $gpu}"
  { run "$recipe" "$seed" "$gpu" "$left"; echo "$gpu" >&9; } &
done; done
wait
summarize
[ $left_over = 0 ] || echo "$left_over runs are left: call again"
[ ! -f "$out/.failed" ]
