#!/usr/bin/env bash
# Downloads GPT-2 tokens of FineWeb 10B (web pages, ODC-By 1.0) to data/fineweb10B/: one validation file and N training files of
# 100 million tokens (200 MB) each. A download that was cut off goes on where it stopped; files that are complete are left alone.
#   data/fineweb.sh [N]      N: 1 ... 103, default 10 (1 billion tokens, 2.2 GB in all)
set -euo pipefail
cd "$(dirname "$0")"

url=https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main
shards=${1:-10}
again="run this again to go on"

fail() { echo "error: $*" >&2; exit 1; }
[[ $shards =~ ^([1-9][0-9]?|10[0-3])$ ]] || fail "data/fineweb.sh $shards: give a number of training files, 1 to 103"

# A token file is complete if its size is what its header says: int32[256] {20240520, 1, tokens, 0...}, then two bytes a token.
complete() {
  [ -f "$1" ] || return 1
  local header
  read -ra header < <(od -An -td4 -N12 "$1")
  [ "${#header[@]}" = 3 ] && [ "${header[0]}" = 20240520 ] && [ "${header[1]}" = 1 ] && [ "$(wc -c < "$1")" -eq $((1024 + 2 * header[2])) ]
}

download() {
  local file=$1
  if complete "$file"; then return; fi
  echo "data/fineweb10B/$file"
  if ! complete "$file.part"; then
    if command -v curl > /dev/null; then curl -fL --retry 3 -C - -o "$file.part" "$url/$file" || fail "cannot download $url/$file; $again"
    elif command -v wget > /dev/null; then wget -c -O "$file.part" "$url/$file" || fail "cannot download $url/$file; $again"
    else fail "neither curl nor wget is installed"; fi
  fi
  complete "$file.part" || fail "data/fineweb10B/$file.part is damaged or not complete: remove it and run this again"
  mv "$file.part" "$file"
}

mkdir -p fineweb10B
cd fineweb10B
download fineweb_val_000000.bin
for ((i = 1; i <= shards; i++)); do download "$(printf 'fineweb_train_%06d.bin' "$i")"; done
cat <<END
data/fineweb10B holds $shards training files. To train:
  ./train_fp4 --train 'data/fineweb10B/fineweb_train_*.bin' --val data/fineweb10B/fineweb_val_000000.bin
END
