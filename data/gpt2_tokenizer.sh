#!/usr/bin/env bash
# Gets GPT-2's tokenizer (MIT licence) and writes it as a rank file, data/gpt2.tiktoken: for each token a line with its bytes in
# base64, a space and its number.
#   data/gpt2_tokenizer.sh [FILE]      FILE: a vocab.bpe or merges.txt that is already here, instead of downloading it
#
# vocab.bpe (Hugging Face calls it merges.txt) lists, in order, the pairs of tokens to merge. Tokens 0 ... 255 are the single bytes,
# token 256 + i is the i-th pair joined. So that it is text, the file writes each byte as a printable character: those that are
# printable in Latin-1 as themselves, the other 68 as U+0100, U+0101, ...; the bytes' tokens are numbered in the same order.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }
here=$(dirname "$0")
out=$here/gpt2.tiktoken
merges=${1:-$here/vocab.bpe}
sources=(https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe
         https://huggingface.co/openai-community/gpt2/resolve/main/merges.txt)

command -v python3 > /dev/null || fail "python3 is needed to convert the file"
if [ $# = 0 ] && [ ! -f "$merges" ]; then
  for url in "${sources[@]}"; do
    if command -v curl > /dev/null; then curl -fL --retry 3 -o "$merges.part" "$url" && break
    elif command -v wget > /dev/null; then wget -O "$merges.part" "$url" && break
    else fail "neither curl nor wget is installed"; fi
    rm -f "$merges.part"
  done
  [ -f "$merges.part" ] || fail "cannot download ${sources[0]}, nor ${sources[1]}"
  mv "$merges.part" "$merges"
fi
[ -f "$merges" ] || fail "there is no file $merges"

python3 - "$merges" "$out" <<'END'
import base64, hashlib, os, sys
source, out = sys.argv[1:]
printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
others = [b for b in range(256) if b not in printable]
byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
tokens = [bytes([b]) for b in printable + others]
lines = [l for l in open(source, encoding="utf-8").read().split("\n") if l and not l.startswith("#version")]
try:
    tokens += [bytes(byte_of[c] for c in line if c != " ") for line in lines]
except KeyError as e:
    sys.exit(f"error: {source} is no vocab.bpe: it holds {e}; remove it and run this again")
text = "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)).encode()
if hashlib.sha256(text).hexdigest() != "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930":
    sys.exit(f"error: {source} gives {len(tokens)} tokens that are not GPT-2's 50256; remove it and run this again")
with open(out + ".tmp", "wb") as f:
    f.write(text)
os.replace(out + ".tmp", out)
END
echo "$out is complete: 50256 tokens and <|endoftext|>. Now, for example:"
echo "  ./tokenize --tokenizer $out --out data/mytext --val-fraction 0.1 mytext.txt"
