#!/usr/bin/env bash
# Trains GPT-2 124M on 10 billion tokens of FineWeb (llm.c's recipe of batch, schedule and steps) in NVFP4; any option can be added:
#   scripts/train_gpt2_124m.sh --recipe bf16 --out out/gpt2-bf16
# Goes on where it stopped when it is started again. Needs data/fineweb.sh and data/gpt2_tokenizer.sh to have been run, and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/gpt2-124m
args=("$@")
for ((i = 0; i < ${#args[@]}; i++)); do [[ ${args[i]} == --out || ${args[i]} == -o ]] && out=${args[i + 1]}; done
compgen -G 'data/fineweb10B/fineweb_train_*.bin' > /dev/null || { echo "error: no data/fineweb10B/fineweb_train_*.bin; run data/fineweb.sh first" >&2; exit 1; }
resume=()
compgen -G "$out/step_*" > /dev/null && resume=(--resume)
tokenizer=()
[[ -f data/gpt2.tiktoken ]] && tokenizer=(--tokenizer data/gpt2.tiktoken)
make train_fp4
exec ./train_fp4 --model gpt2:d12 --recipe nvfp4 --train 'data/fineweb10B/fineweb_train_*.bin' --val data/fineweb10B/fineweb_val_000000.bin \
  "${tokenizer[@]}" --batch 32 --seq 1024 --total-batch 524288 --steps 19560 --lr 6e-4 --warmup 700 --min-lr 0 --weight-decay 0.1 \
  --val-every 250 --val-batches 20 --sample-every 2000 --save-every 1000 --out "$out" "${resume[@]}" "$@"
