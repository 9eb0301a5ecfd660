#!/usr/bin/env bash
# Trains the same small Llama with every recipe, on the same batches from the same initial weights, and compares the losses.
#
#   scripts/compare_recipes.sh TRAIN VAL [OUT]        TRAIN, VAL: GPT-2 token files; OUT: default out/compare
#
# The setting: llama:30M, sequence 512, 128 sequences a step, 1602 steps (105M tokens), AdamW .9/.95, weight decay .1, clip 1, peak 1.2e-3,
# 10 % warm-up, cosine to 10 %. Runs that are finished are not repeated; one that was stopped goes on where it stopped. Writes
# OUT/results.csv: recipe, seed, validation loss, mean training loss of the last 100 steps, and both gaps to bf16 of the same seed. The
# training-loss gap on the same batches is the sharper figure: two seeds of one recipe differ by about .014, so only paired differences count.
#   SEEDS="1 2"      RECIPES="bf16 nvfp4 ..."      STEPS=1602      MODEL=llama:30M      BATCH=128 (sequences in a micro-batch of 128 in all)
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: scripts/compare_recipes.sh TRAIN VAL [OUT]" >&2; exit 2; }
train=$(realpath -m "$1") val=$(realpath -m "$2")
out=$(realpath -m "${3:-out/compare}")
cd "$(dirname "$0")/.."
seeds=${SEEDS:-1337}
recipes=${RECIPES:-bf16 fp8 nvfp4 nvfp4-46 tetrajet2 quartet2 quartet quartet-v4 fp4-dge fqt tetrajet tetrajet2+osci-reset tetrajet2+outcontrol nvfp4+no-tail}
steps=${STEPS:-1602} model=${MODEL:-llama:30M} batch=${BATCH:-128}
[ -x ./train_fp4 ] || make train_fp4
mkdir -p "$out"

extra_options() {
  case $1 in
    *+osci-reset) echo "--oscillation osci-reset" ;;
    *+outcontrol) echo "--outliers outcontrol" ;;
    *+no-tail) echo "--bf16-last 0" ;;
    *+*) echo "error: $1: after the + only osci-reset, outcontrol and no-tail are known" >&2; exit 2 ;;
  esac
}
for seed in $seeds; do for recipe in $recipes; do
  run=$out/$recipe-$seed
  [ -f "$run/done" ] && continue
  echo "== $recipe, seed $seed"
  options=$(extra_options "$recipe")
  resume=$(compgen -G "$run/step_*" > /dev/null && echo --resume || true)
  # shellcheck disable=SC2086
  ./train_fp4 --model "$model" --recipe "${recipe%%+*}" $options --train "$train" --val "$val" --batch "$batch" --seq 512 --total-batch $((128 * 512)) \
    --steps "$steps" --lr 1.2e-3 --min-lr 0.1 --val-every 0 --val-batches $((20 * 128 / batch)) --sample-length 0 --save-every 400 --keep 1 \
    --seed "$seed" --out "$run" $resume > "$run.txt" || { tail -n 3 "$run.txt"; echo "error: $recipe failed; see $run.txt" >&2; exit 1; }
  rm -rf "$run"/step_*
  touch "$run/done"
done; done

# The last line of log.csv holds the validation loss; the last 100 lines the training losses.
summary() { awk -F, 'NR > 1 { train[NR] = $3; if ($4 != "") val = $4 } END { n = NR - 1 < 100 ? NR - 1 : 100; for (i = NR - n + 1; i <= NR; i++) s += train[i]; printf "%.4f,%.4f", val, s / n }' "$1"; }
echo "recipe,seed,val_loss,train_loss_last_100,val_gap,train_gap" > "$out/results.csv.new"
for seed in $seeds; do for recipe in $recipes; do
  base=""
  [ -f "$out/bf16-$seed/log.csv" ] && base=$(summary "$out/bf16-$seed/log.csv")
  awk -v r="$recipe" -v s="$seed" -v x="$(summary "$out/$recipe-$seed/log.csv")" -v b="$base" 'BEGIN { split(x, a, ","); split(b, c, ",");
    if (b == "") printf "%s,%s,%s,,\n", r, s, x; else printf "%s,%s,%s,%+.4f,%+.4f\n", r, s, x, a[1] - c[1], a[2] - c[2] }' >> "$out/results.csv.new"
done; done
mv "$out/results.csv.new" "$out/results.csv"
column -s, -t "$out/results.csv" 2> /dev/null || cat "$out/results.csv"
