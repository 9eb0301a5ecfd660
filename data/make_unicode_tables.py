#!/usr/bin/env python3
"""Prints data/unicode_tables.h: which characters are letters (\\p{L}), numbers (\\p{N}) and white space (\\s).

  pip install unicodedata2==16.0.0        # Unicode 16, that of tiktoken 0.14
  python3 data/make_unicode_tables.py > data/unicode_tables.h

Without unicodedata2 the Unicode version is that of the Python that runs this. A newer version knows
more letters (16 over 14: the ideographs of extension I, Garay, Todhri, ...); text in other scripts is split the same way.
"""
import sys
try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

WHITE_SPACE_CONTROLS = {9, 10, 11, 12, 13, 0x85}      # property White_Space outside the categories Zs, Zl, Zp


def in_class(c, letter):
    category = unicodedata.category(chr(c))
    return category[0] == letter or (letter == "Z" and c in WHITE_SPACE_CONTROLS)


def ranges(letter):
    """[first, last] of each run of code points of the class."""
    runs = []
    for c in range(sys.maxunicode + 1):
        if in_class(c, letter):
            if runs and runs[-1][1] == c - 1:
                runs[-1][1] = c
            else:
                runs.append([c, c])
    return runs


def print_table(name, comment, letter):
    runs = ranges(letter)
    count = sum(last - first + 1 for first, last in runs)
    print(f"\n// {comment}: {count} characters in {len(runs)} ranges")
    print(f"inline constexpr CodePoints {name}[] = {{")
    items = [f"{{0x{first:x},0x{last:x}}}," for first, last in runs]
    line = " "
    for item in items:
        if len(line) + len(item) + 1 > 148:
            print(line)
            line = " "
        line += " " + item
    print(line)
    print("};")


print(f"""\
// data/unicode_tables.h -- letters, numbers and white space of Unicode {unicodedata.unidata_version}, for the tokenizer.
// Made by data/make_unicode_tables.py; do not edit.
#pragma once
#include <cstdint>

struct CodePoints {{ uint32_t first, last; }};                     // both included""")
print_table("kLetters", "\\p{L}", "L")
print_table("kNumbers", "\\p{N}", "N")
print_table("kWhiteSpace", "\\s", "Z")
