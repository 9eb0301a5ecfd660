#!/usr/bin/env bash
# Downloads tiny Shakespeare (1.1 MB, public domain) to data/tinyshakespeare.txt.
set -euo pipefail
cd "$(dirname "$0")"

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
file=tinyshakespeare.txt
size=1115394

size_of() { wc -c < "$1" | tr -d ' '; }
fail() { echo "error: $*" >&2; exit 1; }

if [ ! -f $file ] || [ "$(size_of $file)" != $size ]; then
  if command -v curl > /dev/null; then curl -fL --retry 3 -o $file.part "$url" || fail "cannot download $url"
  elif command -v wget > /dev/null; then wget -O $file.part "$url" || fail "cannot download $url"
  else fail "neither curl nor wget is installed"; fi
  [ "$(size_of $file.part)" = $size ] || fail "data/$file.part has $(size_of $file.part) bytes, not $size; try again"
  mv $file.part $file
fi
cat <<END
data/$file is complete. To train on its bytes, validating on the last tenth:
  ./train_fp4 --train data/$file --val-fraction 0.1
or on GPT-2 tokens:
  data/gpt2_tokenizer.sh && ./tokenize --out data/tinyshakespeare --val-fraction 0.1 data/$file
  ./train_fp4 --train data/tinyshakespeare_train.bin --val data/tinyshakespeare_val.bin
END
