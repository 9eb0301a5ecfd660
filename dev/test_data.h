// dev/test_data.h -- checks of data/tokenizer.h, data/loader.h and ./tokenize. No GPU and no download is needed.
//   FP4_GPT2_RANKS   GPT-2's rank file (default data/gpt2.tiktoken); without one, the checks against known GPT-2 tokens are skipped
//   FP4_TOKENIZE     the program ./tokenize; without one, its checks are skipped
#pragma once
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>
#include "../data/loader.h"
#include "../data/tokenizer.h"
#include "testing.h"

namespace data_test {

using Strings = std::vector<std::string>;
using Tokens = std::vector<uint16_t>;
using Ints = std::vector<int>;

// ---------------------------------------------------------------------------------------------------------------------------------
// tools

// A directory for the files of these checks, removed with them at the end.
struct ScratchDirectory {
  std::string path;
  ScratchDirectory() {
    const char* tmp = getenv("TMPDIR");
    path = std::string(tmp ? tmp : "/tmp") + "/fp4_test_data_XXXXXX";
    if (!mkdtemp(&path[0])) { perror("mkdtemp"); exit(1); }
  }
  ~ScratchDirectory() {
    const std::string command = "rm -rf '" + path + "'";
    if (system(command.c_str())) fprintf(stderr, "could not remove %s\n", path.c_str());
  }
  std::string operator/(const std::string& name) const { return path + "/" + name; }
};

inline std::string write_file(const std::string& path, const std::string& bytes) {
  FILE* f = fopen(path.c_str(), "wb");
  if (!f || fwrite(bytes.data(), 1, bytes.size(), f) != bytes.size() || fclose(f)) { perror(path.c_str()); exit(1); }
  return path;
}

inline std::string read_all(const std::string& path) {
  std::string bytes;
  FILE* f = fopen(path.c_str(), "rb");
  if (!f) return bytes;
  char buffer[65536];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;) bytes.append(buffer, n);
  fclose(f);
  return bytes;
}

// A token file, byte by byte.
inline std::string token_file(const Tokens& tokens, int64_t promised = -1, uint32_t magic = 20240520, uint32_t version = 1) {
  std::string bytes;
  auto put = [&](uint32_t v, int n) { for (int i = 0; i < n; i++) bytes += (char)(v >> 8 * i & 0xff); };
  put(magic, 4);
  put(version, 4);
  put((uint32_t)(promised < 0 ? (int64_t)tokens.size() : promised), 4);
  bytes.resize(1024);
  for (uint16_t t : tokens) put(t, 2);
  return bytes;
}

// The tokens of a token file as ./tokenize wrote it; {} unless header and size agree.
inline Tokens tokens_of(const std::string& path) {
  const std::string bytes = read_all(path);
  auto get = [&](size_t at, int n) { uint32_t v = 0; for (int i = 0; i < n; i++) v |= (uint32_t)(uint8_t)bytes[at + i] << 8 * i; return v; };
  if (bytes.size() < 1024 || get(0, 4) != 20240520 || get(4, 4) != 1 || bytes.size() != 1024 + 2 * (size_t)get(8, 4)) return {};
  Tokens tokens;
  for (size_t i = 1024; i < bytes.size(); i += 2) tokens.push_back((uint16_t)get(i, 2));
  return tokens;
}

inline Tokens counting_tokens(int n) {                           // token i is i, so that a token tells its position
  Tokens t(n);
  std::iota(t.begin(), t.end(), 0);
  return t;
}

// f must end in one line "error: ..." that contains all of `words`, and with this exit code.
template <class F> void check_dies(const std::string& sentence, int exit_code, const Strings& words, F f) {
  const ChildResult r = in_child(f);
  bool ok = r.exit_code == exit_code && r.output.rfind("error: ", 0) == 0 && std::count(r.output.begin(), r.output.end(), '\n') == 1;
  for (const std::string& word : words) ok = ok && r.output.find(word) != std::string::npos;
  std::string shown = r.output.substr(0, r.output.find('\n'));
  check(sentence, ok, "exit %d, %s", r.exit_code, shown.c_str());
}

inline std::string utf8(uint32_t c) {
  if (c < 0x80) return {(char)c};
  if (c < 0x800) return {(char)(0xc0 | c >> 6), (char)(0x80 | (c & 63))};
  if (c < 0x10000) return {(char)(0xe0 | c >> 12), (char)(0x80 | (c >> 6 & 63)), (char)(0x80 | (c & 63))};
  return {(char)(0xf0 | c >> 18), (char)(0x80 | (c >> 12 & 63)), (char)(0x80 | (c >> 6 & 63)), (char)(0x80 | (c & 63))};
}
inline bool is_surrogate(uint32_t c) { return c >= 0xd800 && c < 0xe000; }

inline std::string decode_all(const Tokenizer& t, const Tokens& tokens) {
  std::string text;
  for (int token : tokens) text += t.decode(token);
  return text;
}

inline std::string random_bytes(Rng& rng, int n) {
  std::string s;
  for (int i = 0; i < n; i++) s += (char)rng.below(256);
  return s;
}

// Letters, numbers, signs, white space and apostrophes of many scripts and of one to four bytes, some of them broken.
inline std::string random_text(Rng& rng) {
  static const Strings parts = {
      " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085",
      "'", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "a", "Z", "re", "l",
      "\u00e9", "\u0416", "\u05d0", "\u4e2d", "\uac00", "\U00020000", "7", "42", "\u00bd", "\u0664", "\u2167", "\u3007",
      ".", "!?", "_", "\u20ac", "\u0301", "\u200b", "\U0001f600",
      "\x80", "\xff", "\xc3", "\xe4\xb8", "\xed\xa0\x80", "\xf0\x9f\x98"};
  std::string s;
  for (int n = 1 + rng.below(25); n > 0; n--) s += parts[rng.below((int)parts.size())];
  return s;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// UTF-8 and Unicode

inline void test_utf8() {
  if (!section("data: UTF-8 and the Unicode tables")) return;
  int wrong = 0;
  for (uint32_t c = 0; c <= 0x10ffff; c++) {
    const Utf8Char d = decode_utf8(utf8(c));
    const size_t length = utf8(c).size();
    wrong += is_surrogate(c) ? d.code_point != kInvalidCodePoint || d.length != 1 : d.code_point != c || (size_t)d.length != length;
  }
  check("every code point is decoded from its UTF-8 form, and surrogates are invalid", wrong == 0, "%d wrong", wrong);

  wrong = 0;
  for (uint32_t c = 0x80; c <= 0x10ffff; c += 13) {
    const std::string s = utf8(c);
    for (size_t n = 1; n < s.size(); n++) wrong += decode_utf8(s.substr(0, n)).length != 1 || decode_utf8(s.substr(0, n) + "a").length != 1;
  }
  check("a character that is cut off is an invalid byte", wrong == 0, "%d wrong", wrong);

  wrong = 0;
  for (std::string_view s : {"\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xe0\x9f\xbf", "\xf0\x80\x80\x80", "\xf0\x8f\xbf\xbf",
                             "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff\xff\xff\xff", "\xfe"}) {
    const Utf8Char d = decode_utf8(s);
    wrong += d.code_point != kInvalidCodePoint || d.length != 1;
  }
  check("overlong forms, stray bytes and numbers above 0x10ffff are invalid", wrong == 0, "%d wrong", wrong);

  auto tidy = [](const auto& table) {                            // sorted, and neighbours do not touch
    bool ok = true;
    for (size_t i = 0; i < std::size(table); i++) ok = ok && table[i].first <= table[i].last && (i == 0 || table[i].first > table[i - 1].last + 1);
    return ok;
  };
  check("the tables are sorted and their ranges apart", tidy(kLetters) && tidy(kNumbers) && tidy(kWhiteSpace));

  int count[4] = {0, 0, 0, 0};
  for (uint32_t c = 0; c <= 0x10ffff; c++) if (!is_surrogate(c)) count[(int)class_of_code_point(c)]++;
  check("Unicode 16 has 141028 letters, 1911 numbers and 25 white space characters",
        count[(int)CharClass::letter] == 141028 && count[(int)CharClass::number] == 1911 && count[(int)CharClass::space] == 25, "%d, %d, %d",
        count[(int)CharClass::letter], count[(int)CharClass::number], count[(int)CharClass::space]);

  auto all_are = [](CharClass kind, std::initializer_list<uint32_t> cs) {
    bool ok = true;
    for (uint32_t c : cs) ok = ok && class_of_code_point(c) == kind;
    return ok;
  };
  check("letters: of Latin, Greek, Hebrew, Han, Hangul, and modifier letters, at the ends of their ranges",
        all_are(CharClass::letter, {'A', 'Z', 'a', 'z', 0xaa, 0xb5, 0xba, 0xc0, 0xd6, 0xf8, 0x2c1, 0x3b1, 0x5d0, 0x3400, 0x4dbf, 0x4e00, 0x9fff,
                                    0xac00, 0xd7a3, 0x20000, 0x2ebf0, 0x323af}));
  check("numbers: digits, fractions, superscripts, Roman and Han numerals",
        all_are(CharClass::number, {'0', '9', 0xb2, 0xb3, 0xb9, 0xbc, 0xbe, 0x660, 0x966, 0x2160, 0x2182, 0x2460, 0x3007, 0x1d7ce, 0x1d7ff}));
  check("white space: as in Unicode's property, so not U+001C...1F and no zero-width characters",
        all_are(CharClass::space, {' ', '\t', '\n', '\v', '\f', '\r', 0x85, 0xa0, 0x1680, 0x2000, 0x200a, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000}) &&
        all_are(CharClass::sign, {0x1c, 0x1f, 0x180e, 0x200b, 0x200d, 0x2060, 0xfeff}));
  check("signs: punctuation, symbols, combining marks, controls, emoji, unassigned and private",
        all_are(CharClass::sign, {0, '!', '@', '[', '_', '{', 0x7f, 0xd7, 0xf7, 0x300, 0x20ac, 0x378, 0xe000, 0x1f600, 0x10ffff}));
}

// ---------------------------------------------------------------------------------------------------------------------------------
// pieces

inline std::string printable(const std::string& s) {             // white space and broken bytes as C writes them
  std::string out;
  for (size_t i = 0; i < s.size();) {
    const Utf8Char c = decode_utf8(std::string_view(s).substr(i));
    char code[16];
    if (c.code_point == kInvalidCodePoint) snprintf(code, sizeof code, "\\x%02x", (uint8_t)s[i]);
    else snprintf(code, sizeof code, "\\u%04x", c.code_point);
    const bool plain = c.code_point != kInvalidCodePoint && (c.code_point == ' ' || class_of_code_point(c.code_point) != CharClass::space);
    out += s[i] == '\n' ? "\\n" : s[i] == '\r' ? "\\r" : s[i] == '\t' ? "\\t" : plain ? s.substr(i, c.length) : code;
    i += c.length;
  }
  return out;
}

inline std::string cut(std::string_view text) {                  // pieces, with | between
  std::string out;
  while (!text.empty()) {
    const size_t n = next_piece(text);
    if (n == 0 || n > text.size()) return "no progress";
    out += std::string(out.empty() ? "" : "|") + std::string(text.substr(0, n));
    text.remove_prefix(n);
  }
  return out;
}

// The regular expression read literally: each alternative in turn, and backtracking where it has any. Offsets of characters and their
// classes come as lists, so that nothing of next_piece() is shared but the tables.
struct Characters { std::vector<size_t> at; std::vector<CharClass> kind; };
inline Characters characters(std::string_view s) {
  Characters c;
  for (size_t i = 0; i < s.size();) {
    const Utf8Char d = decode_utf8(s.substr(i));
    c.at.push_back(i);
    c.kind.push_back(d.code_point == kInvalidCodePoint ? CharClass::sign : class_of_code_point(d.code_point));
    i += d.length;
  }
  c.at.push_back(s.size());
  return c;
}
inline size_t regex_match(std::string_view s, const Characters& c, size_t first) {   // index of the character after the match
  const size_t n = c.kind.size();
  for (const char* word : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
    if (s.substr(c.at[first], strlen(word)) == word) return first + strlen(word);
  for (CharClass kind : {CharClass::letter, CharClass::number, CharClass::sign}) {
    for (size_t spaces : {1, 0}) {                               // ` ?` is greedy: with the space first
      if (spaces && s[c.at[first]] != ' ') continue;
      size_t end = first + spaces;
      while (end < n && c.kind[end] == kind) end++;
      if (end > first + spaces) return end;
    }
  }
  size_t run = first;
  while (run < n && c.kind[run] == CharClass::space) run++;
  for (size_t end = run; end > first; end--)                     // \s+(?!\S): the longest one that is not before a non-space
    if (end == n || c.kind[end] == CharClass::space) return end;
  return run;                                                    // \s+
}
inline std::string cut_by_regex(std::string_view s) {
  const Characters c = characters(s);
  std::string out;
  for (size_t i = 0; i < c.kind.size();) {
    const size_t next = regex_match(s, c, i);
    out += std::string(i ? "|" : "") + std::string(s.substr(c.at[i], c.at[next] - c.at[i]));
    i = next;
  }
  return out;
}

inline void test_pieces() {
  if (!section("data: GPT-2's regular expression")) return;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"Hello world", "Hello| world"},
      {"a  b   c    d", "a| | b|  | c|   | d"},
      {"line\nbreak\n\n\n  indented\n", "line|\n|break|\n\n\n | indented|\n"},
      {"\t\tif (x) {\r\n", "\t|\t|if| (|x|)| {|\r\n"},
      {"I'm you'll they've don't he'd it's we're", "I|'m| you|'ll| they|'ve| don|'t| he|'d| it|'s| we|'re"},
      {"I'LL o'clock ''s 'tis rock'n'roll", "I|'|LL| o|'|clock| ''|s| '|tis| rock|'|n|'|roll"},
      {"'s't'll've 's", "'s|'t|'ll|'ve| '|s"},
      {"'", "'"}, {"'l", "'|l"}, {"'r", "'|r"}, {"'v e", "'|v| e"},
      {"abc123def 4.5e-6", "abc|123|def| 4|.|5|e|-|6"},
      {"<|endoftext|>", "<||endoftext||>"},
      {" ", " "}, {"  ", "  "}, {"  x", " | x"}, {"x  ", "x|  "}, {" \n x", " \n| x"}, {"\n x", "\n| x"}, {"\nx", "\n|x"}, {"\n\nx", "\n|\n|x"},
      {"\u00a0x", "\u00a0|x"}, {" \u3000x", " |\u3000|x"}, {"x\u3000\u3000 y", "x|\u3000\u3000| y"},
      {"na\u00efve \u65e5\u672c\u8a9e42\u00bd", "na\u00efve| \u65e5\u672c\u8a9e|42\u00bd"},
      {"e\u0301 \u200b", "e|\u0301| \u200b"},
      {" \U0001f600\U0001f44d!a", " \U0001f600\U0001f44d!|a"},
      {"a\x80\xff b\xc3", "a|\x80\xff| b|\xc3"}};
  for (const auto& [text, expected] : cases)
    check("cut into pieces: " + printable(expected), cut(text) == expected, "%s", cut(text) == expected ? "" : printable(cut(text)).c_str());

  Rng rng(1);
  int wrong = 0;
  constexpr int kTexts = 20000;
  for (int i = 0; i < kTexts; i++) {
    const std::string s = i % 4 ? random_text(rng) : random_bytes(rng, 1 + rng.below(30));
    wrong += cut(s) != cut_by_regex(s);
  }
  check("random text is cut as the regular expression read literally says", wrong == 0, "%d of %d differ", wrong, kTexts);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// byte pair encoding

inline std::string base64(const std::string& bytes) {
  const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    uint32_t v = 0;
    for (size_t j = 0; j < 3; j++) v = v << 8 | (j < n ? (uint8_t)bytes[i + j] : 0);
    for (size_t j = 0; j < 4; j++) out += j <= n ? digits[v >> (18 - 6 * j) & 63] : '=';
  }
  return out;
}

inline Strings single_bytes() {
  Strings s;
  for (int b = 0; b < 256; b++) s.push_back(std::string(1, (char)b));
  return s;
}

inline std::string rank_file(const Strings& tokens) {
  std::string text;
  for (size_t i = 0; i < tokens.size(); i++) text += base64(tokens[i]) + " " + std::to_string(i) + "\n";
  return text;
}

// Byte pair encoding as it is defined: look at all pairs, merge the best, start again.
inline Tokens encode_piece_slowly(const std::map<std::string, int>& ranks, const std::string& piece) {
  Strings parts;
  for (char c : piece) parts.push_back(std::string(1, c));
  for (;;) {
    int best = -1, best_rank = 0;
    for (size_t i = 0; i + 1 < parts.size(); i++) {
      const auto found = ranks.find(parts[i] + parts[i + 1]);
      if (found != ranks.end() && (best < 0 || found->second < best_rank)) { best = (int)i; best_rank = found->second; }
    }
    if (best < 0) break;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + best + 1);
  }
  Tokens out;
  for (const std::string& p : parts) out.push_back((uint16_t)ranks.at(p));
  return out;
}

inline void test_small_bpe(const ScratchDirectory& dir) {
  if (!section("data: tokenizers")) return;
  const Tokenizer bytes = Tokenizer::bytes();
  Rng rng(2);
  const std::string noise = random_bytes(rng, 1000);
  const Tokens byte_tokens = bytes.encode(noise);
  bool same = byte_tokens.size() == noise.size();
  for (size_t i = 0; same && i < noise.size(); i++) same = byte_tokens[i] == (uint8_t)noise[i];
  check("bytes: a token is a byte, and bytes come back", same && decode_all(bytes, byte_tokens) == noise);
  check("bytes: vocabulary 256 and no end-of-text token", bytes.vocab() == 256 && bytes.end_of_text() == -1);
  check("bytes: a token outside the vocabulary is decoded to its number in brackets", bytes.decode(256) == "<|256|>" && bytes.decode(-1) == "<|-1|>");

  Strings tokens = single_bytes();
  for (const char* t : {"ab", "bc", "abc", "cd", "aa", " a"}) tokens.push_back(t);     // 256 ... 261
  const std::string path = write_file(dir / "small.tiktoken", rank_file(tokens));
  const Tokenizer small = Tokenizer::gpt2(path.c_str());
  check("rank file: vocabulary and end of text follow from the number of ranks", small.vocab() == 263 && small.end_of_text() == 262);
  check("rank file: end of text is decoded to its name, and numbers beyond to brackets",
        small.decode(262) == "<|endoftext|>" && small.decode(263) == "<|263|>");
  check("the lowest rank is merged first: abcd = abc d", small.encode("abcd") == Tokens({258, 'd'}));
  check("a merge takes the bytes from another pair: bcd = bc d", small.encode("bcd") == Tokens({257, 'd'}));
  check("of equal pairs, the left one: aaa = aa a", small.encode("aaa") == Tokens({260, 'a'}));
  check("a lower rank on the right comes first: aaab = aa ab", small.encode("aaab") == Tokens({260, 256}));
  check("nothing is merged across pieces: 'a b' = a, ' ', b", small.encode("a b") == Tokens({'a', ' ', 'b'}) && small.encode(" a") == Tokens({261}));
  check("an empty text has no tokens", small.encode("").empty());
  const Tokens ordinary = small.encode("<|endoftext|>");
  check("<|endoftext|> in a text is ordinary text", decode_all(small, ordinary) == "<|endoftext|>" && ordinary.size() == 13);

  std::string shuffled;                                          // last rank first, and Windows line ends
  for (size_t i = tokens.size(); i-- > 0;) shuffled += base64(tokens[i]) + " " + std::to_string(i) + "\r\n";
  const Tokenizer other = Tokenizer::gpt2(write_file(dir / "shuffled.tiktoken", shuffled).c_str());
  check("the order of the lines of a rank file does not matter", other.encode("abcd aaab") == small.encode("abcd aaab") && other.vocab() == 263);

  int wrong = 0;
  std::map<std::string, int> ranks;
  std::string longest;
  for (int table = 0; table < 8; table++) {                      // merges of random tokens that consist of few letters
    Strings merges = single_bytes();
    Strings words = {"a", "b", "c", "d"};
    ranks.clear();
    for (int b = 0; b < 256; b++) ranks[merges[b]] = b;
    while (words.size() < 100) {
      const std::string joined = words[rng.below((int)words.size())] + words[rng.below((int)words.size())];
      if (ranks.emplace(joined, (int)merges.size()).second) { merges.push_back(joined); words.push_back(joined); }
    }
    const Tokenizer t = Tokenizer::gpt2(write_file(dir / "random.tiktoken", rank_file(merges)).c_str());
    for (int i = 0; i < 400; i++) {
      std::string s;
      for (int n = 1 + rng.below(i % 10 ? 40 : 300); n > 0; n--) s += (char)('a' + rng.below(4));
      const Tokens expected = ranks.count(s) ? Tokens{(uint16_t)ranks[s]} : encode_piece_slowly(ranks, s);
      wrong += t.encode(s) != expected || t.encode(s) != expected;                    // the second time from memory
    }
  }
  check("random ranks: the heap merges as the definition does", wrong == 0, "%d of 3200 differ", wrong);

  const std::string long_word(100000, 'a');
  const Tokens long_tokens = small.encode(long_word);
  check("a word of 100,000 letters is no trouble", long_tokens == Tokens(50000, 260));

  std::string text;
  for (int i = 0; i < 2000; i++) text += random_text(rng);
  Tokens pieces;
  std::string_view rest = text;
  bool progress = true;
  while (!rest.empty() && progress) {
    const size_t n = small.encode_prefix(rest, 1 + rng.below(100), pieces);
    progress = n > 0;
    rest.remove_prefix(n);
  }
  check("a text encoded in parts gives the tokens of the whole", progress && pieces == small.encode(text));
}

inline void test_rank_file_errors(const ScratchDirectory& dir) {
  if (!section("data: rank files that are wrong")) return;
  auto dies = [&](const char* sentence, const char* name, const std::string& text, const Strings& words) {
    const std::string path = write_file(dir / name, text);
    Strings all = words;
    all.push_back(path);
    check_dies(sentence, 1, all, [&] { Tokenizer::gpt2(path.c_str()); });
  };
  const std::string none = dir / "none.tiktoken";
  check_dies("a missing rank file is named, and what gets it", 1, {none, "No such file", "gpt2_tokenizer.sh"},
             [&] { Tokenizer::gpt2(none.c_str()); });
  check_dies("a directory is no rank file", 1, {dir.path}, [&] { Tokenizer::gpt2(dir.path.c_str()); });
  dies("an empty rank file", "empty.tiktoken", "", {"empty"});
  dies("a line without a rank", "norank.tiktoken", "YQ== 0\nYg==\n", {"line 2"});
  dies("a line that is not base64", "nobase.tiktoken", "YQ== 0\nY*== 1\n", {"line 2"});
  dies("a rank that is no number", "nonumber.tiktoken", "YQ== -1\n", {"line 1"});
  dies("a rank too large for 16 bits", "large.tiktoken", "YQ== 65535\n", {"65535"});
  dies("a rank twice", "twice.tiktoken", "YQ== 0\nYg== 0\n", {"line 2", "second time"});
  dies("a rank that is missing", "hole.tiktoken", "YQ== 0\nYg== 2\n", {"incomplete"});
  Strings tokens = single_bytes();
  tokens[255] = "ab";
  dies("a byte that is no token", "nobyte.tiktoken", rank_file(tokens), {"0xff"});
  tokens = single_bytes();
  tokens.push_back("a");
  dies("a token twice", "same.tiktoken", rank_file(tokens), {"97", "256"});
}

inline void test_gpt2() {
  if (!section("data: GPT-2's tokens")) return;
  const char* env = getenv("FP4_GPT2_RANKS");
  const char* path = env ? env : "data/gpt2.tiktoken";
  if (access(path, F_OK) != 0)
    return skip("known GPT-2 tokens", std::string("there is no ") + path + " (data/gpt2_tokenizer.sh gets it, or set FP4_GPT2_RANKS)");
  const Tokenizer t = Tokenizer::gpt2(path);
  check("vocabulary 50257, of which <|endoftext|> is 50256", t.vocab() == 50257 && t.end_of_text() == 50256);

  const std::vector<std::pair<std::string, Tokens>> known = {
      {"Hello world", {15496, 995}},
      {" the", {262}},
      {"Hello, world!", {15496, 11, 995, 0}},
      {"I'm sure you'll say they've don't, he'd it's we're I'LL",
       {40, 1101, 1654, 345, 1183, 910, 484, 1053, 836, 470, 11, 339, 1549, 340, 338, 356, 821, 314, 6, 3069}},
      {"a  b   c    d", {64, 220, 275, 220, 220, 269, 220, 220, 220, 288}},
      {"line\nbreak\n\n\n  indented\n", {1370, 198, 9032, 628, 198, 220, 773, 4714, 198}},
      {"\t\tif (x) {\r\n", {197, 197, 361, 357, 87, 8, 1391, 201, 198}},
      {"na\u00efve caf\u00e9", {2616, 38776, 40304}},
      {"\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", {33768, 98, 17312, 105, 45739, 252, 5641, 24336, 25084, 43302}},
      {"\U0001f600\U0001f44d\U0001f3fd", {47249, 222, 41840, 235, 8582, 237, 121}},
      {"\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440", {140, 253, 21169, 18849, 38857, 16843, 20375, 11, 12466, 120, 18849, 21169}},
      {"1234567890 3.14159 \u00bd", {10163, 2231, 30924, 3829, 513, 13, 1415, 19707, 25208}},
      {"<|endoftext|>", {27, 91, 437, 1659, 5239, 91, 29}},
      {" ", {220}},
      {"\n\n", {628}},
      {"tabs\tand\u00a0no-break\u3000space", {8658, 82, 197, 392, 1849, 3919, 12, 9032, 5099, 222, 13200}},
      {" SolidGoldMagikarp", {43453}},
      {"antidisestablishmentarianism", {415, 29207, 44390, 3699, 1042}},
      {"e\u0301 \u200b", {68, 136, 223, 20126}}};
  int wrong = 0;
  std::string first_wrong;
  for (const auto& [text, tokens] : known) if (t.encode(text) != tokens && !wrong++) first_wrong = text;
  check("English, code, white space, numbers, Cyrillic, Japanese and emoji have the known tokens", wrong == 0, "%d of %zu differ %s", wrong,
        known.size(), first_wrong.c_str());

  std::string text;                                              // each 7th code point after a space, a letter, a number and itself
  for (uint32_t c = 0; c <= 0x10ffff; c += 7) if (!is_surrogate(c)) text += " " + utf8(c) + "a" + utf8(c) + "1" + utf8(c) + "\n";
  const Tokens tokens = t.encode(text);
  uint64_t hash = 0xcbf29ce484222325ull;                         // FNV-1a, a token at a time
  for (uint16_t token : tokens) hash = (hash ^ token) * 0x100000001b3ull;
  check("2.5 MB of all scripts have the tokens that tiktoken 0.14 gives", tokens.size() == 2494856 && hash == 0x91683dc00967e323ull,
        "%zu tokens, hash %llx", tokens.size(), (unsigned long long)hash);
  check("... and come back", decode_all(t, tokens) == text);

  Rng rng(3);
  wrong = 0;
  for (int i = 0; i < 2000; i++) {
    const std::string s = i % 2 ? random_text(rng) : random_bytes(rng, rng.below(200));
    wrong += decode_all(t, t.encode(s)) != s;
  }
  check("random bytes come back", wrong == 0, "%d of 2000 differ", wrong);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// the program

inline ChildResult run_program(Strings words) {
  return in_child([&] {
    std::vector<char*> argv;
    for (std::string& w : words) argv.push_back(&w[0]);
    argv.push_back(nullptr);
    execv(argv[0], argv.data());
    perror(argv[0]);
    _exit(99);
  });
}

inline void test_tokenize_program(const ScratchDirectory& dir) {
  if (!section("data: ./tokenize")) return;
  const char* env = getenv("FP4_TOKENIZE");
  const std::string program = env ? env : "./tokenize";
  if (access(program.c_str(), X_OK) != 0) return skip("the program's checks", "there is no " + program + " (make builds it, or set FP4_TOKENIZE)");
  auto run = [&](Strings words) { words.insert(words.begin(), program); return run_program(words); };
  auto dies = [&](const std::string& sentence, int code, const Strings& expected, const Strings& words) {
    check_dies(sentence, code, expected, [&] {
      std::vector<char*> argv = {const_cast<char*>(program.c_str())};
      for (const std::string& w : words) argv.push_back(const_cast<char*>(w.c_str()));
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      _exit(99);
    });
  };
  std::string text;
  for (int i = 0; i < 500; i++) text += "line " + std::to_string(i) + " of a file\n";
  const std::string a = write_file(dir / "a.txt", text), b = write_file(dir / "b.txt", "abc aab");
  const Tokenizer bytes = Tokenizer::bytes();

  const ChildResult help = run({"--help"});
  bool all_options = help.exit_code == 0;
  for (const char* o : {"--tokenizer", "--out", "--val-fraction", "--shard-tokens", "--separator"})
    all_options = all_options && help.output.find(o) != help.output.npos;
  check("--help explains every option and exits 0", all_options);

  ChildResult r = run({"--tokenizer", "bytes", "--out", dir / "whole", a, b});
  check("bytes of two files in one token file", r.exit_code == 0 && tokens_of(dir / "whole.bin") == bytes.encode(text + "abc aab"), "%s",
        r.exit_code ? r.output.c_str() : "");

  r = run({"--tokenizer=bytes", "--val-fraction=0.1", "--out=" + (dir / "split"), a});
  const Tokens train = tokens_of(dir / "split_train.bin"), val = tokens_of(dir / "split_val.bin");
  Tokens joined = train;
  joined.insert(joined.end(), val.begin(), val.end());
  check("--val-fraction: both files together are the text, cut at a line's end near the fraction",
        r.exit_code == 0 && joined == bytes.encode(text) && !train.empty() && train.back() == '\n' &&
        std::abs((double)val.size() / text.size() - 0.1) < 0.005, "%zu + %zu tokens", train.size(), val.size());

  r = run({"--tokenizer", "bytes", "--shard-tokens", "1000", "--out", dir / "shard", a});
  Tokens shards;
  size_t count = 0, full = 0;
  for (char name[32]; snprintf(name, sizeof name, "shard_%06zu.bin", count + 1), access((dir / name).c_str(), F_OK) == 0; count++) {
    const Tokens t = tokens_of(dir / name);
    full += t.size() == 1000;
    shards.insert(shards.end(), t.begin(), t.end());
  }
  check("--shard-tokens: files of that many tokens, the last one shorter", r.exit_code == 0 && shards == bytes.encode(text) && full == count - 1,
        "%zu files", count);
  dies("shards of an earlier run are not mixed with new ones", 1, {"shard_000001.bin", "already there"},
       {"--tokenizer", "bytes", "--shard-tokens", "1000", "--out", dir / "shard", a});

  Strings ranks = single_bytes();
  ranks.push_back("ab");                                         // 256; end of text is 257
  const std::string rank_path = write_file(dir / "program.tiktoken", rank_file(ranks));
  const std::string documents = write_file(dir / "documents.txt", "ab<sep>cab<sep><sep>d");
  r = run({"--tokenizer", rank_path, "--separator", "<sep>", "--out", dir / "documents", documents, b});
  check("end of text goes before each document, and separators are left out",
        r.exit_code == 0 && tokens_of(dir / "documents.bin") == Tokens({257, 256, 257, 'c', 256, 257, 'd', 257, 256, 'c', ' ', 'a', 256}));

  std::string long_text;
  for (int i = 0; i < 60000; i++) long_text += "abab " + std::to_string(i) + "   word\n";
  const std::string long_path = write_file(dir / "long.txt", long_text);
  r = run({"--tokenizer", rank_path, "--out", dir / "long", long_path});
  Tokens expected = Tokenizer::gpt2(rank_path.c_str()).encode(long_text);
  expected.insert(expected.begin(), 257);
  check("a text that is larger than what is encoded at once", r.exit_code == 0 && tokens_of(dir / "long.bin") == expected, "%zu bytes",
        long_text.size());

  const std::string left = run_program({"/bin/ls", dir.path}).output;
  check("no temporary file is left", left.find(".tmp") == std::string::npos);

  dies("no input file: exit 2", 2, {"no input file"}, {"--out", dir / "x"});
  dies("no --out: exit 2", 2, {"--out"}, {a});
  dies("an unknown option: exit 2", 2, {"--shards", "--help"}, {"--shards", "3", "--out", dir / "x", a});
  dies("an option without its value: exit 2", 2, {"--out", "value"}, {a, "--out"});
  dies("a senseless fraction: exit 2", 2, {"--val-fraction 1.5"}, {"--val-fraction", "1.5", "--out", dir / "x", a});
  dies("a senseless shard size: exit 2", 2, {"--shard-tokens 10k"}, {"--shard-tokens", "10k", "--out", dir / "x", a});
  dies("an input that is missing is named", 1, {dir / "none.txt"}, {"--tokenizer", "bytes", "--out", dir / "x", dir / "none.txt"});
  dies("a directory is no input", 1, {dir.path, "not a regular file"}, {"--tokenizer", "bytes", "--out", dir / "x", dir.path});
  const std::string none = dir / "none.tiktoken";
  dies("a tokenizer that is missing is named", 1, {none}, {"--tokenizer", none, "--out", dir / "x", a});
  dies("an output that cannot be written is named", 1, {dir / "nowhere/x.bin"}, {"--tokenizer", "bytes", "--out", dir / "nowhere/x", a});
  dies("empty input", 1, {"empty"}, {"--tokenizer", "bytes", "--out", dir / "x", write_file(dir / "empty.txt", "")});
}

// ---------------------------------------------------------------------------------------------------------------------------------
// shuffling

inline bool is_permutation(int64_t n, uint64_t seed, uint64_t epoch) {
  std::vector<bool> seen(n);
  for (int64_t i = 0; i < n; i++) {
    const int64_t p = shuffled_index(i, n, seed, epoch);
    if (p < 0 || p >= n || seen[p]) return false;
    seen[p] = true;
  }
  return true;
}

inline void test_shuffle() {
  if (!section("data: the shuffle")) return;
  int wrong = 0;
  for (int n = 1; n <= 300; n++) wrong += !is_permutation(n, n * 7, n % 5);
  for (int64_t n : {1023, 1024, 1025, 4096, 4097, 65536, 99991}) wrong += !is_permutation(n, 42, 3);
  check("it is a permutation for every number of windows from 1 to 300, and larger ones", wrong == 0, "%d are not", wrong);

  bool inside = true;
  const int64_t large = 9000000000000000ll;
  for (int64_t i = 0; i < 1000; i++) { const int64_t p = shuffled_index(i * 1000003, large, 1, 0); inside = inside && p >= 0 && p < large; }
  check("it stays inside for 9e15 windows", inside);

  // Where index i lands over 40000 epochs: each of 10 places 4000 times; sigma = sqrt(40000 * 0.1 * 0.9) = 60, and 100 figures are looked at.
  int counts[10][10] = {}, pairs = 0;
  for (int epoch = 0; epoch < 40000; epoch++) {
    int64_t before = -5;
    for (int i = 0; i < 10; i++) {
      const int64_t p = shuffled_index(i, 10, 7, epoch);
      counts[i][p]++;
      pairs += p == before + 1;
      before = p;
    }
  }
  int worst = 0;
  for (auto& row : counts) for (int c : row) worst = std::max(worst, std::abs(c - 4000));
  check("every place is equally likely: within 4.5 sigma", worst < 270, "worst is off by %d, sigma is 60", worst);
  // A window follows its own predecessor in 9 of the 90 ordered pairs; 9 neighbours an epoch: 0.9 an epoch expected, sigma < 1 an epoch.
  check("neighbours are no likelier than others to stay neighbours: within 4 sigma", std::abs(pairs - 36000) < 800, "%d of 36000 expected", pairs);

  int same_epoch = 0, same_seed = 0, fixed = 0;
  for (int i = 0; i < 10000; i++) {
    const int64_t p = shuffled_index(i, 10000, 1, 0);
    same_epoch += p == shuffled_index(i, 10000, 1, 1);
    same_seed += p == shuffled_index(i, 10000, 2, 0);
    fixed += p == i;
  }
  check("another epoch or seed is another order, and none is the file's order", same_epoch < 8 && same_seed < 8 && fixed < 8,
        "%d, %d, %d of 10000 places agree; 1 expected", same_epoch, same_seed, fixed);
  check("the order is that of a Python version of the same formulas: five values",
        shuffled_index(0, 1000, 42, 0) == 519 && shuffled_index(1, 1000, 42, 0) == 957 && shuffled_index(999, 1000, 42, 7) == 251 &&
        shuffled_index(123456789, 1000000000, 5, 1) == 58598382 && shuffled_index(0, 3, 0, 0) == 0);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// the loader

inline DataOptions with(int seq_len, uint64_t seed = 1, int vocab = 65536) {
  DataOptions o;
  o.seq_len = seq_len;
  o.seed = seed;
  o.vocab = vocab;
  return o;
}
inline DataOptions part_of(DataPart part, double val_fraction, int seq_len) {
  DataOptions o = with(seq_len);
  o.part = part;
  o.val_fraction = val_fraction;
  return o;
}

struct Batch {
  Ints inputs, targets;
  bool operator==(const Batch& b) const { return inputs == b.inputs && targets == b.targets; }
};
inline Batch shuffled_batch(const DataLoader& d, int64_t first, int B) {
  Batch b{Ints(B * d.T, -7), Ints(B * d.T, -7)};
  d.load_shuffled(first, B, b.inputs.data(), b.targets.data());
  return b;
}
inline Batch batch_in_order(const DataLoader& d, int64_t first, int B) {
  Batch b{Ints(B * d.T, -7), Ints(B * d.T, -7)};
  d.load_in_order(first, B, b.inputs.data(), b.targets.data());
  return b;
}

// Tokens of the whole part in order, from targets (and the first input).
inline Ints all_tokens(const DataLoader& d) {
  Ints tokens = {batch_in_order(d, 0, 1).inputs[0]};
  for (int64_t w = 0; w < d.windows_and_tail(); w++) for (int t : batch_in_order(d, w, 1).targets) if (t >= 0) tokens.push_back(t);
  return tokens;
}
inline Ints ints(const Tokens& t, size_t from = 0, size_t to = SIZE_MAX) { return Ints(t.begin() + from, t.begin() + std::min(to, t.size())); }
inline Ints ints(const std::string& s) { Ints v; for (uint8_t c : s) v.push_back(c); return v; }

inline void test_windows(const ScratchDirectory& dir) {
  if (!section("data: windows of a token file")) return;
  const Tokens tokens = counting_tokens(1003);
  const DataLoader d(write_file(dir / "count.bin", token_file(tokens)), with(10));
  check("1003 tokens are 100 windows of 10, and a tail", d.windows() == 100 && d.windows_and_tail() == 101 && d.tokens() == 1003 && !d.is_text());
  int wrong = 0;
  const Batch b = batch_in_order(d, 0, 100);
  for (int i = 0; i < 1000; i++) wrong += b.inputs[i] != i || b.targets[i] != i + 1;
  check("in order, window w starts at token w * T, and targets are the next tokens", wrong == 0, "%d wrong", wrong);
  const Batch tail = batch_in_order(d, 100, 2);
  Ints inputs(20, 0), targets(20, -1);
  inputs[0] = 1000; inputs[1] = 1001; targets[0] = 1001; targets[1] = 1002;
  check("the tail has targets up to the last token, then -1", tail == Batch{inputs, targets});
  check("so every token but the first is a target once", all_tokens(d) == ints(tokens));
  check("windows far beyond the end are -1 too", batch_in_order(d, INT64_MAX / 100, 1) == Batch{Ints(10, 0), Ints(10, -1)});
  for (int n : {1001, 1002, 1010, 1011}) {
    const DataLoader e(write_file(dir / "edge.bin", token_file(counting_tokens(n))), with(10));
    check("every token is a target, and no more, with " + std::to_string(n) + " tokens",
          all_tokens(e) == ints(counting_tokens(n)) && e.windows() == (n - 1) / 10 && e.windows_and_tail() == (n - 1 + 9) / 10);
  }
  const DataLoader one(write_file(dir / "one.bin", token_file(counting_tokens(11))), with(10));
  check("T + 1 tokens are enough: every sequence of every epoch is the one window",
        one.windows() == 1 && shuffled_batch(one, 5, 1) == batch_in_order(one, 0, 1));

  std::vector<int> times(100);
  bool whole = true;
  for (int s = 0; s < 300; s++) {
    const Batch w = shuffled_batch(d, s, 1);
    const int first = w.inputs[0];
    whole = whole && first % 10 == 0 && w == batch_in_order(d, first / 10, 1);
    if (whole) times[first / 10]++;
    if (s % 100 == 99) wrong += std::count(times.begin(), times.end(), s / 100 + 1) != 100;
  }
  check("shuffled, every window comes once in each epoch", whole && wrong == 0);

  check("each epoch has an order of its own", !(shuffled_batch(d, 0, 100) == shuffled_batch(d, 100, 100)));

  const DataLoader again(dir / "count.bin", with(10)), other(dir / "count.bin", with(10, 2));
  const Batch all = shuffled_batch(d, 0, 250);
  check("the same seed gives the same sequences, another seed others",
        shuffled_batch(again, 0, 250) == all && !(shuffled_batch(other, 0, 250) == all));
  Batch resumed = shuffled_batch(again, 0, 90);                  // stopped, and started again with another batch size, across the end of an epoch
  for (int s = 90; s < 250; s += 16) {
    const Batch more = shuffled_batch(DataLoader(dir / "count.bin", with(10)), s, 16);
    resumed.inputs.insert(resumed.inputs.end(), more.inputs.begin(), more.inputs.end());
    resumed.targets.insert(resumed.targets.end(), more.targets.begin(), more.targets.end());
  }
  check("a resumed run gets the same batches, knowing only how many sequences came before", resumed == all);
}

inline void test_file_sets(const ScratchDirectory& dir) {
  if (!section("data: shards, texts and lists")) return;
  const Tokens tokens = counting_tokens(2345);
  const DataLoader one(write_file(dir / "one_file.bin", token_file(tokens)), with(32));
  size_t at = 0, number = 0;
  for (size_t n : {1000, 1, 0, 31, 1313}) {
    write_file(dir / ("cut_" + std::to_string(number++) + ".bin"), token_file(Tokens(tokens.begin() + at, tokens.begin() + at + n)));
    at += n;
  }
  const DataLoader many(dir / "cut_*.bin", with(32));
  check("shards and one file give the same windows in the same order",
        many.shards.size() == 5 && many.windows() == one.windows() && shuffled_batch(many, 0, 200) == shuffled_batch(one, 0, 200) &&
        batch_in_order(many, 0, 74) == batch_in_order(one, 0, 74));
  check("... and every token, wherever the shards are cut", all_tokens(many) == ints(tokens));

  mkdir((dir / "texts").c_str(), 0755);
  mkdir((dir / "texts/sub").c_str(), 0755);
  write_file(dir / "texts/b.txt", "second\xff");
  write_file(dir / "texts/a.txt", "first ");
  write_file(dir / "texts/c,d e.cu", "third");
  write_file(dir / "texts/empty.h", "");
  write_file(dir / "texts/.hidden", "no");
  auto tokens_from = [&](const std::string& what) { return all_tokens(DataLoader(what, with(4, 1, 256))); };
  const std::string p = dir / "texts/";
  check("a text's bytes are its tokens", tokens_from(p + "b.txt") == ints("second\xff") && DataLoader(p + "b.txt", with(4)).is_text());
  check("a pattern takes its files in sorted order", tokens_from(p + "*.txt") == ints("first second\xff"));
  check("so does a list, whatever its order and separators, and a file named twice comes once",
        tokens_from(p + "b.txt," + p + "a.txt") == ints("first second\xff") &&
        tokens_from(p + "b.txt, " + p + "*.txt  " + p + "a.txt,") == ints("first second\xff"));
  check("a file whose name has a comma and a space is found", tokens_from(p + "c,d e.cu") == ints("third"));
  check("a directory is its files, without hidden ones and directories",
        tokens_from(dir / "texts") == ints("first second\xffthird") && tokens_from(p) == ints("first second\xffthird"));

  std::string text;
  for (int i = 0; i < 1000; i++) text += (char)('a' + i % 26);
  write_file(dir / "long_text.txt", text);
  const DataLoader train(dir / "long_text.txt", part_of(DataPart::train, 0.1, 16)), val(dir / "long_text.txt", part_of(DataPart::val, 0.1, 16));
  check("--val-fraction 0.1: trains on the first 900 of 1000 tokens, validates on the last 100", train.tokens() == 900 && val.tokens() == 100 &&
        all_tokens(train) == ints(text.substr(0, 900)) && all_tokens(val) == ints(text.substr(900)));
  check("--val-fraction 0: trains on all", DataLoader(dir / "long_text.txt", part_of(DataPart::train, 0, 16)).tokens() == 1000);
  const DataLoader cut_train(dir / "cut_*.bin", part_of(DataPart::train, 0.3, 16)), cut_val(dir / "cut_*.bin", part_of(DataPart::val, 0.3, 16));
  check("shards can be split so, too", all_tokens(cut_train) == ints(tokens, 0, 1641) && all_tokens(cut_val) == ints(tokens, 1641));
}

// More tokens than are looked at before training, in a file with a hole (it takes no room on the disk).
inline void test_huge_file(const ScratchDirectory& dir) {
  const int64_t count = (1ll << 30) + (1 << 22), bad = (1ll << 29) + 12345;
  const std::string path = write_file(dir / "huge.bin", token_file({}, count));
  auto put = [&](int64_t position, uint16_t token) {
    FILE* f = fopen(path.c_str(), "r+b");
    const bool ok = f && fseeko(f, 1024 + 2 * position, SEEK_SET) == 0 && fwrite(&token, 2, 1, f) == 1;
    return (!f || fclose(f) == 0) && ok;
  };
  if (truncate(path.c_str(), 1024 + 2 * count) || !put(bad, 1000) || !put(count - 1, 9))
    return skip("files of more than 2^31 bytes", "this file system has no room for one");
  const DataLoader d(path, with(1024, 1, 1000));
  const Batch last = batch_in_order(d, d.windows_and_tail() - 1, 1);
  check("positions beyond 2^30 are read", d.tokens() == count && last.targets[1022] == 9 && last.targets[1023] == -1 && last.inputs[1022] == 0);
  check_dies("a token outside the vocabulary deep inside a huge set is found when it is loaded", 1, {path, std::to_string(bad), "token 1000", "999"},
             [&] { batch_in_order(d, bad / 1024, 1); });
  remove(path.c_str());
}

inline void test_loader_errors(const ScratchDirectory& dir) {
  if (!section("data: files that are wrong")) return;
  auto open = [](const std::string& what, DataOptions options) { return [=] { DataLoader(what, options); }; };
  auto dies = [&](const std::string& sentence, const std::string& name, const std::string& bytes, const Strings& words) {
    const std::string path = write_file(dir / name, bytes);
    Strings all = words;
    all.insert(all.end(), {"--train", path});
    check_dies(sentence, 1, all, open(path, with(10)));
  };
  const Tokens tokens = counting_tokens(100);
  check_dies("a file that is missing is named", 1, {"--train", dir / "none.bin", "No such file"}, open(dir / "none.bin", with(10)));
  check_dies("a pattern without a match is shown", 1, {"--train", "nothing matches", dir / "none_*.bin"}, open(dir / "none_*.bin", with(10)));
  check_dies("so is one among several", 1, {dir / "none_*.bin"}, open((dir / "count.bin") + "," + (dir / "none_*.bin"), with(10)));
  check_dies("no name at all", 1, {"--train", "no file"}, open(" ", with(10)));
  mkdir((dir / "hollow").c_str(), 0755);
  check_dies("an empty directory", 1, {dir / "hollow", "no files"}, open(dir / "hollow", with(10)));
  mkdir((dir / "mixed").c_str(), 0755);
  write_file(dir / "mixed/val.bin", token_file(tokens));
  check_dies("a directory of token files could mix training and validation", 1, {dir / "mixed", "val.bin", "pattern"}, open(dir / "mixed", with(10)));
  check_dies("tokens and text together", 1, {"count.bin", "a.txt"}, open((dir / "count.bin") + "," + (dir / "texts/a.txt"), with(10)));
  DataOptions named = with(10);
  named.option = "--val";
  check_dies("the error names the option that it comes from", 1, {"--val:"}, open(dir / "none.bin", named));

  dies("a header that says more tokens than the file holds", "short.bin", token_file(tokens, 101), {"truncated", "101", "100"});
  dies("a file that ends inside its header", "header.bin", token_file(tokens).substr(0, 500), {"truncated", "500"});
  dies("a file that ends inside a token", "odd.bin", token_file(tokens).substr(0, 1024 + 151), {"truncated"});
  dies("an odd size", "odd_size.bin", token_file(tokens) + "x", {"odd size"});
  dies("more tokens than the header says, as cat would make", "joined.bin", token_file(tokens) + token_file(tokens), {"712", "only 100"});
  dies("a negative number of tokens", "negative.bin", token_file(tokens, 0x80000000ll), {"damaged"});
  dies("another version", "version.bin", token_file(tokens, 100, 20240520, 2), {"version 2"});
  dies("a .bin file with another magic number", "magic.bin", token_file(tokens, 100, 12345), {"no token file", "12345"});
  dies("an empty .bin file", "empty.bin", "", {"is empty"});
  dies("tokens of 32 bits", "llama3.bin", token_file(tokens, 100, 20240801, 7), {"32 bits"});
  dies("fewer tokens than one window", "few.bin", token_file(counting_tokens(10)), {"only 10 tokens", "takes 11", "lower --seq"});
  dies("a text shorter than one window", "few.txt", "0123456789", {"only 10 tokens", "lower --seq"});
  dies("an empty text", "nothing.txt", "", {"only 0 tokens"});
  const std::string text = dir / "long_text.txt";
  check_dies("a validation part that is too small", 1, {"validation part", text, "raise --val-fraction"},
             open(text, part_of(DataPart::val, 0.01, 16)));
  check_dies("a training part that is too small", 1, {"training part", text, "--val-fraction"}, open(text, part_of(DataPart::train, 0.99, 16)));
  check_dies("a fraction of 1", 1, {"--val-fraction 1"}, open(text, part_of(DataPart::train, 1, 16)));
  check_dies("a sequence of no tokens", 1, {"--seq"}, open(dir / "count.bin", with(0)));

  check_dies("a token outside the vocabulary: file, position, token and vocabulary are named", 1,
             {dir / "count.bin", "position 500", "token 500", "499"}, open(dir / "count.bin", with(10, 1, 500)));
  check_dies("so is a byte, with its position in its own file", 1, {dir / "texts/b.txt", "position 6", "token 255", "199"},
             open(dir / "texts/*.txt", with(4, 1, 200)));
  const ChildResult fits = in_child(open(dir / "count.bin", with(10, 1, 1003)));
  check("a vocabulary that just holds all tokens is fine", fits.exit_code == 0 && fits.output.empty(), "%s", fits.output.c_str());
  test_huge_file(dir);
}

}  // namespace data_test

inline void test_data() {
  using namespace data_test;
  const ScratchDirectory dir;
  test_utf8();
  test_pieces();
  test_small_bpe(dir);
  test_rank_file_errors(dir);
  test_gpt2();
  test_tokenize_program(dir);
  test_shuffle();
  test_windows(dir);
  test_file_sets(dir);
  test_loader_errors(dir);
}
