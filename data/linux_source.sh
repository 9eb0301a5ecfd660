#!/usr/bin/env bash
# GPT-2 tokens of the Linux kernel's C sources (Debian's package linux-source-6.1, GPL-2.0) in data/linux/: about 150 million different
# tokens to train on, so that a run of that length sees nothing twice, and 3 million to validate on.
#   data/linux_source.sh [FILE]      FILE: the package (.deb), or the kernel's own archive linux-source-6.1.tar.xz; default: downloaded by apt-get
# Left out are files that programs wrote: AMD's register lists, a third of all text. The files' order is that of a hash of their paths, the
# same everywhere: neighbours in the text are not neighbours in the kernel, and the validation part is a sample of everything.
set -euo pipefail
export LC_ALL=C                                  # how sort orders paths of one hash, and what awk takes for a character
cd "$(dirname "$0")"
fail() { echo "error: $*" >&2; exit 1; }

train_bytes=318000000 val_bytes=9000000
package=${1:-}
[ -z "$package" ] || package=$(realpath -e "$package") || fail "data/linux_source.sh: there is no file $1"
[ -f gpt2.tiktoken ] || fail "data/gpt2.tiktoken is missing; run data/gpt2_tokenizer.sh first"
(cd .. && make tokenize > /dev/null)
mkdir -p linux
cd linux
if [ -z "$package" ]; then
  command -v apt-get > /dev/null || fail "apt-get is not here; give the package or the kernel's .tar.xz as an argument"
  apt-get download linux-source-6.1 || fail "apt-get cannot download linux-source-6.1"
  package=$(ls linux-source-6.1_*.deb | tail -n 1)
fi
rm -rf tree && mkdir tree
case $package in
  *.deb) dpkg-deb --fsys-tarfile "$package" | tar -xO ./usr/src/linux-source-6.1.tar.xz | xz -d | tar -x -C tree --wildcards '*.c' '*.h' ;;
  *) tar -x -f "$package" -C tree --wildcards '*.c' '*.h' ;;
esac

# A hash of each path (characters as digits to the base 31, modulo a prime) orders the files. The text begins with what is for validation.
(cd tree/* && find . -type f -size +0 ! -path './drivers/gpu/drm/amd/include/*') > paths.txt
awk 'BEGIN { for (i = 1; i < 256; i++) code[sprintf("%c", i)] = i }
     { hash = 7; for (i = 1; i <= length($0); i++) hash = (hash * 31 + code[substr($0, i, 1)]) % 2147483647
       printf "%d %s\n", hash * 48271 % 2147483647, $0 }' paths.txt | sort -k 1,1n -k 2 | cut -d ' ' -f 2- > order.txt
(cd tree/* && xargs -d '\n' cat) < order.txt > all.txt
[ "$(wc -c < all.txt)" -ge $((val_bytes + train_bytes)) ] || fail "the archive holds less text than expected; is it complete?"
head -c "$val_bytes" all.txt > val.txt
tail -c +"$((val_bytes + 1))" all.txt > rest.txt
head -c "$train_bytes" rest.txt > train.txt
../../tokenize --tokenizer ../gpt2.tiktoken --out train train.txt
../../tokenize --tokenizer ../gpt2.tiktoken --out val val.txt
rm -rf tree paths.txt order.txt all.txt rest.txt train.txt val.txt
cat <<END
data/linux holds the tokens. To train:
  ./train_fp4 --train data/linux/train.bin --val data/linux/val.bin
END
