// data/json.h -- a small strict JSON reader, and a writer for the few files we make (RFC 8259).
//
// The reader takes one value and nothing after it. It refuses what the standard refuses: trailing commas, comments, NaN, leading
// zeros, control characters in strings, half surrogates, bytes that are not UTF-8; and two things the standard leaves open: a
// key given twice, and nesting deeper than kJsonDepth. An error is a sentence with the byte where reading stopped.
// Integers are kept exactly (int64), because safetensors offsets are.
#pragma once
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>
#include "errors.h"

constexpr int kJsonDepth = 64;   // objects and arrays inside each other: our files have 4, and recursion must end somewhere

struct Json {
  enum Kind { kNull, kBool, kNumber, kString, kArray, kObject };
  Kind kind = kNull;
  bool boolean = false;
  double number = 0;
  bool is_integer = false;           // written without '.' or exponent, and fits in int64: then `integer` is exact
  int64_t integer = 0;
  std::string string;                // UTF-8, escapes resolved
  std::vector<std::string> keys;     // of an object: keys[i] belongs to items[i]
  std::vector<Json> items;           // of an array or object

  // The value of a key, or nullptr when it is absent or this is no object.
  const Json* find(const std::string& key) const {
    for (size_t i = 0; i < keys.size(); i++) if (keys[i] == key) return &items[i];
    return nullptr;
  }
  bool is_null() const { return kind == kNull; }
};
inline const char* json_kind_name(Json::Kind kind) {
  constexpr const char* names[] = {"null", "true or false", "a number", "a string", "an array", "an object"};
  return names[kind];
}

// Length in bytes of the UTF-8 character at p, or 0 if it is not one (overlong, surrogate, above U+10FFFF, cut off).
inline int utf8_length(const unsigned char* p, size_t left) {
  if (p[0] < 0x80) return 1;
  int n = p[0] >= 0xC2 && p[0] < 0xE0 ? 2 : (p[0] & 0xF0) == 0xE0 ? 3 : p[0] >= 0xF0 && p[0] < 0xF5 ? 4 : 0;
  if (n == 0 || left < (size_t)n) return 0;
  for (int i = 1; i < n; i++) if ((p[i] & 0xC0) != 0x80) return 0;
  if (p[0] == 0xE0 && p[1] < 0xA0) return 0;
  if (p[0] == 0xED && p[1] >= 0xA0) return 0;
  if (p[0] == 0xF0 && p[1] < 0x90) return 0;
  if (p[0] == 0xF4 && p[1] >= 0x90) return 0;
  return n;
}
inline void append_utf8(std::string* s, uint32_t c) {
  if (c < 0x80) { *s += (char)c; return; }
  if (c < 0x800) { *s += (char)(0xC0 | c >> 6); }
  else if (c < 0x10000) { *s += (char)(0xE0 | c >> 12); *s += (char)(0x80 | (c >> 6 & 63)); }
  else { *s += (char)(0xF0 | c >> 18); *s += (char)(0x80 | (c >> 12 & 63)); *s += (char)(0x80 | (c >> 6 & 63)); }
  *s += (char)(0x80 | (c & 63));
}

// ----------------------------------------------------------------------------------------------------------------------------
// Reader: recursive descent. Every function leaves `p` behind what it took, or sets `problem` and returns false.

struct JsonParser {
  const char *begin, *p, *end;
  std::string problem;

  bool fail(const std::string& what) {
    if (problem.empty()) problem = "byte " + std::to_string(p - begin) + ": " + what;
    return false;
  }
  void skip_space() { while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r')) p++; }
  bool next_is(char c) { skip_space(); return p < end && *p == c; }
  bool expect(char c, const char* where) {
    if (!next_is(c)) return fail(std::string("expected '") + c + "' " + where + (p == end ? ", found the end of the text" : ""));
    p++;
    return true;
  }

  bool value(Json* out, int depth) {
    skip_space();
    if (p == end) return fail("expected a value, found the end of the text");
    if (depth > kJsonDepth) return fail("nested deeper than " + std::to_string(kJsonDepth) + " levels");
    switch (*p) {
      case '{': return object(out, depth);
      case '[': return array(out, depth);
      case '"': out->kind = Json::kString; return string(&out->string);
      case 't': out->kind = Json::kBool; out->boolean = true; return word("true");
      case 'f': out->kind = Json::kBool; return word("false");
      case 'n': return word("null");
      default: return number(out);
    }
  }
  bool word(const char* w) {
    size_t n = strlen(w);
    if ((size_t)(end - p) < n || memcmp(p, w, n)) return fail("expected a value");
    p += n;
    return true;
  }
  bool object(Json* out, int depth) {
    out->kind = Json::kObject;
    std::set<std::string> seen;
    p++;
    if (next_is('}')) { p++; return true; }
    for (;;) {
      std::string key;
      if (!next_is('"')) return fail("expected a key in quotes");
      if (!string(&key)) return false;
      if (!seen.insert(key).second) return fail("key '" + key + "' is there twice");
      if (!expect(':', "after a key")) return false;
      out->keys.push_back(key);
      out->items.emplace_back();
      if (!value(&out->items.back(), depth + 1)) return false;
      if (next_is(',')) { p++; continue; }
      return expect('}', "or ',' in an object");
    }
  }
  bool array(Json* out, int depth) {
    out->kind = Json::kArray;
    p++;
    if (next_is(']')) { p++; return true; }
    for (;;) {
      out->items.emplace_back();
      if (!value(&out->items.back(), depth + 1)) return false;
      if (next_is(',')) { p++; continue; }
      return expect(']', "or ',' in an array");
    }
  }
  bool hex4(uint32_t* out) {
    *out = 0;
    for (int i = 0; i < 4; i++, p++) {
      char c = p < end ? *p : 0;
      int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) return fail("expected four hexadecimal digits after \\u");
      *out = *out * 16 + (uint32_t)digit;
    }
    return true;
  }
  bool escape(std::string* out) {   // p is behind the backslash
    if (p == end) return fail("a string without its closing quote");
    char c = *p++;
    const char* at = strchr("\"\\/bfnrt", c);
    if (c && at) { *out += "\"\\/\b\f\n\r\t"[at - "\"\\/bfnrt"]; return true; }
    if (c != 'u') { p--; return fail("unknown escape in a string"); }
    uint32_t code, low;
    if (!hex4(&code)) return false;
    if (code >= 0xDC00 && code <= 0xDFFF) return fail("second half of a surrogate pair without the first");
    if (code >= 0xD800 && code <= 0xDBFF) {
      if (end - p < 2 || p[0] != '\\' || p[1] != 'u') return fail("half a surrogate pair");
      p += 2;
      if (!hex4(&low)) return false;
      if (low < 0xDC00 || low > 0xDFFF) return fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(out, code);
    return true;
  }
  bool string(std::string* out) {
    for (p++;;) {
      if (p == end) return fail("a string without its closing quote");
      if (*p == '"') { p++; return true; }
      if (*p == '\\') { p++; if (!escape(out)) return false; continue; }
      if ((unsigned char)*p < 0x20) return fail("a control character in a string");
      int n = utf8_length((const unsigned char*)p, (size_t)(end - p));
      if (n == 0) return fail("bytes that are not UTF-8 in a string");
      out->append(p, (size_t)n);
      p += n;
    }
  }
  bool digits() {
    const char* start = p;
    while (p < end && *p >= '0' && *p <= '9') p++;
    return p > start || fail("expected a digit");
  }
  bool number(Json* out) {
    const char* start = p;
    bool whole = true;
    if (*p == '-') p++;
    if (p == start && (*p < '0' || *p > '9')) return fail("expected a value");
    bool zero = p < end && *p == '0';
    const char* first = p;
    if (!digits()) return false;
    if (zero && p - first > 1) { p = first; return fail("a number with a leading zero"); }
    if (p < end && *p == '.') { p++; whole = false; if (!digits()) return false; }
    if (p < end && (*p == 'e' || *p == 'E')) {
      p++; whole = false;
      if (p < end && (*p == '+' || *p == '-')) p++;
      if (!digits()) return false;
    }
    std::string text(start, p);
    out->kind = Json::kNumber;
    out->number = strtod(text.c_str(), nullptr);
    if (!std::isfinite(out->number)) { p = start; return fail("a number too large for a double"); }
    if (whole) {
      errno = 0;
      out->integer = strtoll(text.c_str(), nullptr, 10);
      out->is_integer = errno == 0;
    }
    return true;
  }
};

// Reads text[0..size). False and a sentence in *problem ("byte 17: expected ...") if it is not JSON.
inline bool json_parse(const char* text, size_t size, Json* out, std::string* problem) {
  JsonParser parser{text, text, text + size, ""};
  *out = Json();
  bool ok = parser.value(out, 1);
  if (ok) {
    parser.skip_space();
    if (parser.p != parser.end) ok = parser.fail("something follows the value");
  }
  *problem = parser.problem;
  return ok;
}
// A whole text file. False and a sentence naming the file if it cannot be read.
inline bool read_text_file(const std::string& path, std::string* text, std::string* problem) {
  FILE* f = fopen(path.c_str(), "rb");
  if (!f) { *problem = "cannot open " + path + ": " + strerror(errno); return false; }
  text->clear();
  char buf[1 << 16];
  for (size_t n; (n = fread(buf, 1, sizeof buf, f)) > 0;) text->append(buf, n);
  bool ok = !ferror(f);
  if (!ok) *problem = "cannot read " + path + ": " + strerror(errno);
  fclose(f);
  return ok;
}
inline bool json_parse_file(const std::string& path, Json* out, std::string* problem) {
  std::string text;
  if (!read_text_file(path, &text, problem)) return false;
  if (json_parse(text.data(), text.size(), out, problem)) return true;
  *problem = path + " is not valid JSON: " + *problem;
  return false;
}
inline Json json_read_file(const std::string& path) {   // the same, but dies
  Json json;
  std::string problem;
  if (!json_parse_file(path, &json, &problem)) die("%s", problem.c_str());
  return json;
}

// ----------------------------------------------------------------------------------------------------------------------------
// Writer: JsonWriter w; w.begin('{').key("layers").integer(12).end(); then w.text. Indented by two spaces, or on one line.

inline std::string json_quote(const std::string& s) {
  std::string out = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') { out += '\\'; out += c; }
    else if (c == '\n') out += "\\n";
    else if (c == '\t') out += "\\t";
    else if ((unsigned char)c < 0x20) { char buf[8]; snprintf(buf, sizeof buf, "\\u%04x", (unsigned char)c); out += buf; }
    else out += c;
  }
  return out + "\"";
}
// The shortest decimal that reads back as the same number. A float first becomes the shortest decimal of that float: 1e-5f is
// written 1e-05, not 9.99999975e-06.
inline std::string json_number(double x) {
  char buf[40];
  if (!std::isfinite(x)) return "null";   // JSON has no NaN
  for (int digits = 1; digits <= 17; digits++) {
    snprintf(buf, sizeof buf, "%.*g", digits, x);
    if (strtod(buf, nullptr) == x) break;
  }
  return buf;
}
inline std::string json_number(float x) {
  char buf[40];
  if (!std::isfinite(x)) return "null";
  for (int digits = 1; digits <= 9; digits++) {
    snprintf(buf, sizeof buf, "%.*g", digits, (double)x);
    if (strtof(buf, nullptr) == x) break;
  }
  return buf;
}

struct JsonWriter {
  bool indent = true;
  std::string text;
  std::string open;        // closing brackets still owed, innermost last
  bool first = true;       // nothing yet in the innermost bracket
  bool after_key = false;

  void separate() {        // what stands before a value or key: nothing behind a key, else a comma and the line break
    if (!after_key && !open.empty()) {
      if (!first) text += indent ? "," : ", ";
      if (indent) text += "\n" + std::string(2 * open.size(), ' ');
    }
    first = after_key = false;
  }
  JsonWriter& raw(const std::string& s) { separate(); text += s; return *this; }
  JsonWriter& begin(char bracket) {   // '{' or '['
    raw(std::string(1, bracket));
    open += bracket == '{' ? '}' : ']';
    first = true;
    return *this;
  }
  JsonWriter& end() {
    char bracket = open.back();
    open.pop_back();
    if (indent && !first) text += "\n" + std::string(2 * open.size(), ' ');
    text += bracket;
    first = false;
    return *this;
  }
  JsonWriter& key(const std::string& name) { raw(json_quote(name) + ": "); after_key = true; return *this; }
  JsonWriter& string(const std::string& s) { return raw(json_quote(s)); }
  JsonWriter& integer(int64_t i) { return raw(std::to_string(i)); }
  JsonWriter& number(float x) { return raw(json_number(x)); }
  JsonWriter& number(double x) { return raw(json_number(x)); }
  JsonWriter& boolean(bool b) { return raw(b ? "true" : "false"); }
  JsonWriter& null() { return raw("null"); }
};
