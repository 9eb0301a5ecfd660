// data/tokenizer.h -- text to tokens and back: bytes (vocabulary 256) and GPT-2's byte pair encoding (vocabulary 50257).
//
// GPT-2's encoding has two steps. First the text is cut into pieces by the regular expression
//     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// written out by hand in next_piece(): a contraction, a word, a number, a run of other signs (each with at most one space before it),
// white space. Then the bytes of each piece are merged, pair by pair: of all neighbours whose joined bytes are a token, those of the
// lowest rank first, the leftmost of equals first, until no pair is left. A token's rank is its number.
//
// The ranks come from a text file in tiktoken's format, a line for each token: its bytes in base64, a space, its rank
// (data/gpt2_tokenizer.sh gets GPT-2's). <|endoftext|> is the number after the last rank, 50256 for GPT-2; it separates documents and
// is never made from text: these letters in a text are encoded as the ordinary letters that they are.
//
// Text is UTF-8, but any bytes are taken and decode() gives them back: a byte that starts no valid sequence counts as a sign.
// Checked against tiktoken 0.14 token for token, for every code point and on books, web text and random bytes.
#pragma once
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>
#include "errors.h"           // defines: die
#include "unicode_tables.h"   // defines: kLetters, kNumbers, kWhiteSpace

// ---------------------------------------------------------------------------------------------------------------------------------
// characters

enum class CharClass : uint8_t { space, letter, number, sign };

template <size_t N> bool in_table(const CodePoints (&table)[N], uint32_t c) {
  size_t low = 0, high = N;                                      // the first range that ends at c or later is in [low, high]
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (table[middle].last < c) low = middle + 1; else high = middle;
  }
  return low < N && table[low].first <= c;
}

inline CharClass class_of_code_point(uint32_t c) {
  if (in_table(kLetters, c)) return CharClass::letter;
  if (in_table(kWhiteSpace, c)) return CharClass::space;
  return in_table(kNumbers, c) ? CharClass::number : CharClass::sign;
}

constexpr uint32_t kInvalidCodePoint = 0xffffffff;               // a byte that starts no valid UTF-8 sequence; it is one byte long

// The character at the start of text (not empty), and its length in bytes. Overlong forms, surrogates, numbers above 0x10ffff and
// sequences that are cut off are invalid.
struct Utf8Char { uint32_t code_point; int length; };
inline Utf8Char decode_utf8(std::string_view text) {
  const uint8_t first = text[0];
  if (first < 0x80) return {first, 1};
  const int length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  const Utf8Char invalid = {kInvalidCodePoint, 1};
  if (first < 0xc2 || first > 0xf4 || (size_t)length > text.size()) return invalid;
  uint32_t c = first & (0x7f >> length);
  for (int i = 1; i < length; i++) {
    if (((uint8_t)text[i] & 0xc0) != 0x80) return invalid;
    c = c << 6 | ((uint8_t)text[i] & 0x3f);
  }
  const bool overlong = (length == 3 && c < 0x800) || (length == 4 && c < 0x10000);
  const bool surrogate = c >= 0xd800 && c <= 0xdfff;
  return overlong || surrogate || c > 0x10ffff ? invalid : Utf8Char{c, length};
}

// ---------------------------------------------------------------------------------------------------------------------------------
// pieces

// The class and length of the character at `at` < text.size(). ASCII, which is most of most texts, comes from a small table.
struct ClassifiedChar { CharClass kind; int length; };
inline ClassifiedChar char_at(std::string_view text, size_t at) {
  static const std::array<CharClass, 128> ascii = [] {
    std::array<CharClass, 128> table{};
    for (uint32_t c = 0; c < 128; c++) table[c] = class_of_code_point(c);
    return table;
  }();
  const uint8_t first = text[at];
  if (first < 0x80) return {ascii[first], 1};
  const Utf8Char c = decode_utf8(text.substr(at));
  return {c.code_point == kInvalidCodePoint ? CharClass::sign : class_of_code_point(c.code_point), c.length};
}

// 's 't 're 've 'm 'll 'd at the start of text: its length, or 0.
inline size_t contraction_length(std::string_view text) {
  if (text.size() < 2 || text[0] != '\'') return 0;
  if (strchr("stmd", text[1]) && text[1]) return 2;
  const std::string_view two = text.substr(1, 2);
  return two == "re" || two == "ve" || two == "ll" ? 3 : 0;
}

// White space at the start of text. Its last character is left to the next piece (as the space before a word, or alone), unless it
// is the only one or ends the text: `\s+(?!\S)|\s+`.
inline size_t white_space_length(std::string_view text) {
  size_t end = 0, last = 0;                                      // end of the run, and start of its last character
  while (end < text.size()) {
    const ClassifiedChar c = char_at(text, end);
    if (c.kind != CharClass::space) break;
    last = end;
    end += c.length;
  }
  return end == text.size() || last == 0 ? end : last;
}

// Length in bytes of the first piece of text (not empty). It depends on nothing before text, so a text is cut from left to right.
inline size_t next_piece(std::string_view text) {
  if (size_t n = contraction_length(text)) return n;
  size_t end = text[0] == ' ' && text.size() > 1 ? 1 : 0;        // one space may lead a word, a number or a run of signs
  const CharClass kind = char_at(text, end).kind;
  if (kind == CharClass::space) return white_space_length(text);
  while (end < text.size()) {
    const ClassifiedChar c = char_at(text, end);
    if (c.kind != kind) break;
    end += c.length;
  }
  return end;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// rank files

// Decodes standard base64 with padding; false if text is none.
inline bool decode_base64(std::string_view text, std::string& bytes) {
  bytes.clear();
  if (text.empty() || text.size() % 4) return false;
  const std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const size_t padding = text[text.size() - 1] != '=' ? 0 : text[text.size() - 2] != '=' ? 1 : 2;
  uint32_t bits = 0;
  for (size_t i = 0; i < text.size() - padding; i++) {
    const size_t digit = alphabet.find(text[i]);
    if (digit == alphabet.npos) return false;
    bits = bits << 6 | (uint32_t)digit;
    if (i % 4) bytes += (char)(bits >> (6 - i % 4 * 2) & 0xff);
  }
  return true;
}

// The bytes of every token, by rank. Dies, naming file and line, unless the ranks are 0, 1, 2, ... (in any order) and their tokens
// differ and contain every single byte.
inline std::vector<std::string> read_rank_file(const char* path) {
  constexpr size_t kMostRanks = 65535;                           // with <|endoftext|>, what the uint16 of a token file can hold
  std::ifstream file(path);
  if (!file) die("cannot open tokenizer %s: %s; data/gpt2_tokenizer.sh gets GPT-2's", path, strerror(errno));
  std::vector<std::string> tokens;
  std::vector<bool> seen;
  std::string line, bytes;
  size_t lines = 0;
  for (size_t number = 1; std::getline(file, line); number++) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) continue;
    lines++;
    const size_t space = line.find(' ');
    const std::string digits = space == line.npos ? "" : line.substr(space + 1);
    const bool is_number = !digits.empty() && digits.size() <= 9 && digits.find_first_not_of("0123456789") == digits.npos;
    if (!is_number || !decode_base64(std::string_view(line).substr(0, space), bytes))
      die("%s, line %zu: not 'base64 rank', as a tokenizer's rank file has in every line", path, number);
    const size_t rank = std::stoul(digits);
    if (rank >= kMostRanks) die("%s, line %zu: rank %zu is too large: token files hold 16 bits a token", path, number, rank);
    if (rank >= seen.size()) { seen.resize(rank + 1); tokens.resize(rank + 1); }
    if (seen[rank]) die("%s, line %zu: rank %zu a second time", path, number, rank);
    seen[rank] = true;
    tokens[rank] = bytes;
  }
  if (file.bad()) die("cannot read tokenizer %s: %s", path, strerror(errno));
  if (!lines) die("%s is empty; a tokenizer's rank file has a line 'base64 rank' for each token", path);
  if (lines != seen.size()) die("%s: %zu lines but the largest rank is %zu: the file is incomplete", path, lines, seen.size() - 1);
  return tokens;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// the tokenizer

// encode() remembers the pieces it has merged, so use one Tokenizer a thread. It can be moved, not copied.
struct Tokenizer {
  static Tokenizer bytes() { return Tokenizer(); }
  static Tokenizer gpt2(const char* rank_file);

  // Number of tokens, <|endoftext|> included.
  int vocab() const { return is_bytes() ? 256 : (int)tokens_.size() + 1; }
  // The token that goes before each document; -1 if there is none.
  int end_of_text() const { return is_bytes() ? -1 : (int)tokens_.size(); }

  std::vector<uint16_t> encode(std::string_view text) const {
    std::vector<uint16_t> out;
    encode_prefix(text, text.size(), out);
    return out;
  }
  // Appends the tokens of whole pieces from the start of text until at least `bytes` bytes (or all) are taken; returns how many were.
  // The rest, encoded later, gives the same tokens as all at once: for texts larger than memory.
  size_t encode_prefix(std::string_view text, size_t bytes, std::vector<uint16_t>& out) const;

  // The bytes of a token. One outside the vocabulary (a model's may be padded) gives its number in brackets: <|50300|>.
  std::string decode(int token) const {
    if (token < 0 || token >= vocab()) return "<|" + std::to_string(token) + "|>";
    if (is_bytes()) return std::string(1, (char)token);
    return token == end_of_text() ? "<|endoftext|>" : tokens_[token];
  }

  Tokenizer(Tokenizer&&) = default;
  Tokenizer& operator=(Tokenizer&&) = default;

 private:
  Tokenizer() = default;
  bool is_bytes() const { return tokens_.empty(); }
  int rank(std::string_view bytes) const {                       // -1: no token
    if (bytes.size() > longest_) return -1;
    const auto found = ranks_.find(bytes);
    return found == ranks_.end() ? -1 : found->second;
  }
  void encode_piece(std::string_view piece, std::vector<uint16_t>& out) const;
  void merge_pairs(std::string_view piece, std::vector<uint16_t>& out) const;

  std::vector<std::string> tokens_;                              // bytes of each token; empty for the byte tokenizer
  std::unordered_map<std::string_view, uint16_t> ranks_;         // views of tokens_
  size_t longest_ = 0;                                           // bytes of the longest token
  mutable std::unordered_map<std::string, std::vector<uint16_t>> merged_;   // pieces seen before that are no single token
};

inline Tokenizer Tokenizer::gpt2(const char* rank_file) {
  Tokenizer t;
  t.tokens_ = read_rank_file(rank_file);
  t.ranks_.reserve(t.tokens_.size());
  for (size_t i = 0; i < t.tokens_.size(); i++) {
    if (!t.ranks_.emplace(t.tokens_[i], (uint16_t)i).second)
      die("%s: ranks %d and %zu are the same token", rank_file, t.ranks_[t.tokens_[i]], i);
    t.longest_ = std::max(t.longest_, t.tokens_[i].size());
  }
  for (int b = 0; b < 256; b++) {
    const char byte = (char)b;
    if (t.rank(std::string_view(&byte, 1)) < 0) die("%s: byte 0x%02x is no token; a text could not be encoded", rank_file, b);
  }
  return t;
}

inline size_t Tokenizer::encode_prefix(std::string_view text, size_t bytes, std::vector<uint16_t>& out) const {
  bytes = std::min(bytes, text.size());
  if (is_bytes()) {
    for (size_t i = 0; i < bytes; i++) out.push_back((uint8_t)text[i]);
    return bytes;
  }
  size_t at = 0;
  while (at < bytes) {
    const size_t length = next_piece(text.substr(at));
    encode_piece(text.substr(at, length), out);
    at += length;
  }
  return at;
}

// Most pieces are a token, and most others came before.
inline void Tokenizer::encode_piece(std::string_view piece, std::vector<uint16_t>& out) const {
  constexpr size_t kLongestRemembered = 64, kMostRemembered = 1 << 18;   // bounds merged_ to some 40 MB
  const int whole = rank(piece);
  if (whole >= 0) { out.push_back((uint16_t)whole); return; }
  if (piece.size() > kLongestRemembered) { merge_pairs(piece, out); return; }
  const auto found = merged_.find(std::string(piece));
  if (found != merged_.end()) { out.insert(out.end(), found->second.begin(), found->second.end()); return; }
  const size_t before = out.size();
  merge_pairs(piece, out);
  if (merged_.size() >= kMostRemembered) merged_.clear();
  merged_.emplace(piece, std::vector<uint16_t>(out.begin() + before, out.end()));
}

// A piece of n bytes takes O(n log n): a heap of the pairs that could be merged, lowest rank first, then leftmost. A pair whose parts
// have been merged otherwise since it was noted is dropped when it comes up.
inline void Tokenizer::merge_pairs(std::string_view piece, std::vector<uint16_t>& out) const {
  struct Pair {
    int rank, start, end;                                        // the token of bytes [start, end)
    bool operator>(const Pair& b) const { return rank != b.rank ? rank > b.rank : start > b.start; }
  };
  if (piece.size() > INT32_MAX) die("a single word of %zu bytes: this is no text", piece.size());
  const int n = (int)piece.size();
  std::vector<int> end(n);                                       // of the part that starts here; 0: none starts here
  std::vector<int> before(n + 1);                                // start of the part that ends here; -1: none
  std::priority_queue<Pair, std::vector<Pair>, std::greater<Pair>> pairs;
  auto note_pair = [&](int start) {                              // the part that starts here, with the next one
    if (start < 0 || end[start] == n) return;
    const int stop = end[end[start]], r = rank(piece.substr(start, stop - start));
    if (r >= 0) pairs.push({r, start, stop});
  };
  for (int i = 0; i < n; i++) { end[i] = i + 1; before[i] = i - 1; }
  for (int i = 0; i < n; i++) note_pair(i);
  while (!pairs.empty()) {
    const Pair p = pairs.top();
    pairs.pop();
    const int middle = end[p.start];
    if (middle == 0 || middle == n || end[middle] != p.end) continue;
    end[p.start] = p.end;
    end[middle] = 0;
    before[p.end] = p.start;
    note_pair(p.start);
    note_pair(before[p.start]);
  }
  for (int i = 0; i < n; i = end[i]) out.push_back((uint16_t)rank(piece.substr(i, end[i] - i)));
}
