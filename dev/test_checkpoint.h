// dev/test_checkpoint.h -- data/json.h, data/safetensors.h and data/checkpoint.h: what comes back, what is refused and with which
// words, and what is on the disk when a run is killed or the disk is full. Everything happens in a temporary directory.
#pragma once
#include <signal.h>
#include <sys/resource.h>
#include "../data/checkpoint.h"
#include "testing.h"

namespace checkpoint_tests {

inline void remove_tree(const std::string& path) {
  std::vector<std::string> names;
  struct stat st;
  if (lstat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode) && list_directory(path, &names))
    for (const std::string& name : names) remove_tree(path + "/" + name);
  remove(path.c_str());
}
struct TempDirectory {
  std::string path;
  TempDirectory() {
    const char* base = getenv("TMPDIR");
    std::string name = std::string(base && *base ? base : "/tmp") + "/test_fp4.XXXXXX";
    if (!mkdtemp(&name[0])) die("cannot make a directory %s: %s", name.c_str(), strerror(errno));
    path = name;
  }
  ~TempDirectory() { remove_tree(path); }
};
inline void put_file(const std::string& path, const std::string& bytes) {
  FILE* f = fopen(path.c_str(), "wb");
  if (!f || fwrite(bytes.data(), 1, bytes.size(), f) != bytes.size() || fclose(f)) die("cannot write %s", path.c_str());
}
inline std::string get_file(const std::string& path) {
  std::string text, problem;
  return read_text_file(path, &text, &problem) ? text : "<" + problem + ">";
}
inline bool exists(const std::string& path) { struct stat st; return lstat(path.c_str(), &st) == 0; }
inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
inline int count_hidden(const std::string& directory) {
  std::vector<std::string> names;
  list_directory(directory, &names);
  return (int)std::count_if(names.begin(), names.end(), [](const std::string& n) { return n[0] == '.'; });
}
// A sentence for f: it ends the program with exit code 1 and one line "error: ..." that contains every part.
template <class F> void check_dies(const std::string& sentence, const std::vector<std::string>& parts, F f) {
  ChildResult r = in_child(f);
  bool ok = r.exit_code == 1 && starts_with(r.output, "error: ") && std::count(r.output.begin(), r.output.end(), '\n') == 1;
  for (const std::string& part : parts) ok = ok && contains(r.output, part);
  if (!r.output.empty() && r.output.back() == '\n') r.output.pop_back();
  check(sentence, ok, "exit %d, '%s'", r.exit_code, r.output.c_str());
}
// A safetensors file put together by hand.
inline std::string raw_safetensors(const std::string& header, size_t data_bytes) {
  uint64_t n = header.size();
  return std::string((const char*)&n, 8) + header + std::string(data_bytes, '\1');
}

// ---------------------------------------------------------------------------------------------------------------- JSON

inline void test_json() {
  auto parses = [](const std::string& text, Json* out) { std::string problem; return json_parse(text.data(), text.size(), out, &problem); };
  Json j;
  bool ok = parses(" {\"a\": [1, -2.5e-3, true, false, null, {}], \"b\": {\"c\": \"x\"}, \"big\": 9007199254740993} \n", &j);
  check("JSON: objects, arrays, numbers, words and nesting are read", ok && j.keys.size() == 3 && j.find("a")->items.size() == 6 &&
        j.find("a")->items[0].integer == 1 && j.find("a")->items[1].number == -0.0025 && !j.find("a")->items[1].is_integer &&
        j.find("a")->items[2].boolean && j.find("a")->items[3].kind == Json::kBool && !j.find("a")->items[3].boolean &&
        j.find("a")->items[4].is_null() && j.find("b")->find("c")->string == "x");
  check("JSON: integers above 2^53 keep every digit", ok && j.find("big")->integer == 9007199254740993);
  ok = parses("\"q\\\" \\\\ \\/ \\b\\f\\n\\r\\t \\u00e9\\u20AC\\ud83d\\ude00 \xC3\xA9\"", &j);
  check("JSON: escapes and surrogate pairs become UTF-8", ok && j.string == "q\" \\ / \b\f\n\r\t \xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80 \xC3\xA9");
  std::string bad[] = {
    "", " ", "{", "[1,]", "{\"a\":1,}", "{a:1}", "{\"a\" 1}", "[1 2]", "[1}", "1 2", "{} x", "{\"a\":1,\"a\":2}", "// c\n1",
    "01", "-", "1.", ".5", "+1", "1e", "1e999", std::string("1\0", 2), "NaN", "Infinity", "tru", "nul",
    "'a'", "\"a", "\"\\", "\"\\x\"", "\"\\u12g4\"", "\"\\ud800\"", "\"\\ude00\"", "\"\\ud800\\u0041\"", "\"a\nb\"", std::string("\"a\0b\"", 5),
    "\"\xff\"", "\"\xC0\x80\"", "\"\xED\xA0\x80\"", "\"\xE2\x82\"", "\xEF\xBB\xBF{}"};
  int refused = 0, total = 0;
  for (const std::string& text : bad) {
    total++;
    if (parses(text, &j)) printf("       accepted: %s\n", text.c_str()); else refused++;
  }
  check("JSON: everything that is not strict JSON is refused", refused == total, "%d of %d", refused, total);
  auto nest = [](int n) { return std::string((size_t)n, '[') + std::string((size_t)n, ']'); };
  check("JSON: nesting ends at the limit, not in a stack overflow", parses(nest(kJsonDepth), &j) && !parses(nest(kJsonDepth + 1), &j) &&
        !parses(std::string(1000000, '['), &j));
  std::string problem;
  bool parsed = json_parse("{\"a\": tru}", 10, &j, &problem);
  check("JSON: an error says the byte", !parsed && contains(problem, "byte 6"), "%s", problem.c_str());

  JsonWriter w;
  w.begin('{').key("s \"\\\n\x01").string("\xC3\xA9\t\"").key("n").begin('[').integer(-7).number(1e-5f).number(0.1).null().boolean(true).begin('[').end().end();
  w.key("o").begin('{').end().end();
  ok = parses(w.text, &j) && j.keys[0] == "s \"\\\n\x01" && j.items[0].string == "\xC3\xA9\t\"" && j.items[1].items[0].integer == -7 &&
       (float)j.items[1].items[1].number == 1e-5f && j.items[1].items[2].number == 0.1 && j.items[1].items[5].items.empty() &&
             j.items[2].kind == Json::kObject;
  check("JSON: what the writer writes, the reader reads back", ok && contains(w.text, "1e-05,") && contains(w.text, "0.1,"));
  Rng rng(3);
  int wrong = 0;
  for (int i = 0; i < 2000; i++) {
    uint64_t bits = rng.next();
    double d; float f;
    memcpy(&d, &bits, 8); memcpy(&f, &bits, 4);
    if (std::isfinite(d) && strtod(json_number(d).c_str(), nullptr) != d) wrong++;
    if (std::isfinite(f) && (!parses(json_number(f), &j) || (float)j.number != f)) wrong++;
  }
  check("JSON: numbers survive writing and reading, 2000 random floats and doubles", wrong == 0, "%d wrong", wrong);
  int silent = 0, accepted = 0;       // mostly for ASan and UBSan to watch
  for (int i = 0; i < 5000; i++) {
    std::string text = w.text;
    for (int k = rng.below(4); k >= 0; k--) text[(size_t)rng.below((int)text.size())] = (char)rng.below(256);
    text.resize(text.size() - (size_t)(rng.below(2) ? 0 : rng.below((int)text.size())));
    parsed = json_parse(text.data(), text.size(), &j, &problem);
    accepted += parsed;
    silent += !parsed && !starts_with(problem, "byte ");
  }
  check("JSON: 5000 damaged texts are read or refused with a reason", silent == 0 && accepted > 0 && accepted < 5000, "%d were still JSON", accepted);
}

// ---------------------------------------------------------------------------------------------------------------- safetensors

// Round to nearest even by looking at both neighbours in double precision: shares nothing with the bit trick it checks.
inline float bf16_reference(float x) {
  uint32_t low_bits = bits_of_float(x) & 0xFFFF0000u;
  double low = float_of_bits(low_bits), high = float_of_bits(low_bits + 0x10000);
  if (!std::isfinite((float)high)) high = std::copysign(0x1p128, x);    // behind the largest number comes 2^128 for the comparison
  double d_low = std::fabs((double)x - low), d_high = std::fabs(high - (double)x);
  bool up = d_high < d_low || (d_high == d_low && (low_bits >> 16 & 1));
  return up ? (std::fabs(high) == 0x1p128 ? std::copysign(INFINITY, x) : (float)high) : (float)low;
}
inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

inline void test_round_trip(const std::string& dir) {
  Rng rng(4);
  std::vector<float> x(6 * 1000), y(x.size()), tail(3), scalar(1);
  for (float& f : x) f = float_of_bits((uint32_t)rng.next());           // every kind of float, NaNs with payload too
  x[0] = -0.0f; x[1] = INFINITY; x[2] = float_of_bits(1); x[5] = 3.4e38f;
  for (size_t i = 6; i < 1000; i++)                                     // ties and their neighbours
    x[i] = float_of_bits((bits_of_float(x[i]) & 0xFFFF0000u) + 0x7FFFu + (uint32_t)rng.below(3));
  int64_t big[2] = {INT64_MIN, 123456789012345};
  int32_t ints[3] = {-1, 0, INT32_MAX};
  uint8_t bytes[5] = {0, 1, 2, 254, 255};
  std::string file = dir + "/round \"trip\".safetensors";
  {
    SafetensorsWriter w(file);
    w.metadata["note"] = "caf\xC3\xA9 \"quoted\"\n";
    w.declare("five", "U8", {5});                                       // what follows it lies unaligned
    w.declare("exact", "F32", {6, 1000});
    w.declare("empty", "F32", {0, 4});
    w.declare("round", "BF16", {2, 3, 1000});
    w.declare("scalar", "F32", {});
    w.declare("i32", "I32", {3});
    w.declare("i64", "I64", {2});
    w.write(bytes, 5);
    w.write_f32(x.data(), 1234);                                        // in pieces
    w.write_f32(x.data() + 1234, x.size() - 1234);
    w.write_f32(x.data(), x.size());
    w.write_f32(&x[7], 1);
    w.write(ints, sizeof ints);
    w.write(big, sizeof big);
    check("safetensors: nothing stands under the final name before finish()", !exists(file));
    w.finish();
  }
  check("safetensors: afterwards the file is there and no temporary", exists(file) && count_hidden(dir) == 0);
  SafetensorsReader r(file);
  r.read_f32("exact", {6, 1000}, y.data());
  check("safetensors: FP32 comes back bit for bit (6000 random patterns)", same_bits(x, y));
  r.read_f32("round", {2, 3, 1000}, y.data());
  int wrong = 0;
  for (size_t i = 0; i < x.size(); i++) wrong += x[i] != x[i] ? y[i] == y[i] : bits_of_float(y[i]) != bits_of_float(bf16_reference(x[i]));
  check("safetensors: BF16 is rounded to nearest, ties to even, NaN stays NaN", wrong == 0, "%d of %d wrong", wrong, (int)x.size());
  std::vector<float> rows(2000);
  r.read_rows_f32("exact", {6, 1000}, 3, 2, rows.data());
  r.read_rows_f32("exact", {6, 1000}, 6, 0, nullptr);
  check("safetensors: single rows can be read", same_bits(rows, std::vector<float>(x.begin() + 3000, x.begin() + 5000)));
  r.read_f32("scalar", {}, scalar.data());
  r.read_f32("empty", {0, 4}, nullptr);
  check("safetensors: a scalar and an empty tensor are read", same_bits(scalar, {x[7]}) && r.shape("empty") == std::vector<int64_t>({0, 4}));
  int64_t big2[2]; int32_t ints2[3]; uint8_t bytes2[5];
  r.read_raw("i64", "I64", {2}, big2); r.read_raw("i32", "I32", {3}, ints2); r.read_raw("five", "U8", {5}, bytes2);
  check("safetensors: I64, I32 and U8 come back", !memcmp(big, big2, sizeof big) && !memcmp(ints, ints2, sizeof ints) && !memcmp(bytes, bytes2, 5));
  check("safetensors: metadata comes back", r.metadata["note"] == "caf\xC3\xA9 \"quoted\"\n" && r.metadata["format"] == "pt");
  check("safetensors: has() knows what is there", r.has("i32") && !r.has("i33"));
  check_dies("safetensors: an absent tensor is named", {file, "'absent'"}, [&] { r.read_f32("absent", {1}, y.data()); });
  check_dies("safetensors: a wrong shape says both shapes", {file, "'exact'", "[6, 1000]", "[1000, 6]"},
        [&] { r.read_f32("exact", {1000, 6}, y.data()); });
  check_dies("safetensors: integers are not read as weights", {file, "'i32'", "I32"}, [&] { r.read_f32("i32", {3}, y.data()); });
  check_dies("safetensors: raw data must have the dtype asked for", {file, "'i32'", "I32", "U8"}, [&] { r.read_raw("i32", "U8", {3}, ints2); });
  check_dies("safetensors: rows past the end are refused", {file, "'exact'", "6 rows"}, [&] { r.read_rows_f32("exact", {6, 1000}, 5, 2, rows.data()); });

  std::string halves;
  for (int i = 0; i < 65536; i++) { halves += (char)(i & 255); halves += (char)(i >> 8); }
  std::string header = "{\"h\": {\"dtype\": \"F16\", \"shape\": [65536], \"data_offsets\": [0, 131072]}}";
  put_file(dir + "/f16.safetensors", raw_safetensors(header, 0) + halves);
  std::vector<float> h(65536);
  SafetensorsReader(dir + "/f16.safetensors").read_f32("h", {65536}, h.data());
  wrong = 0;
  for (int i = 0; i < 65536; i++) {
    int e = i >> 10 & 31, m = i & 1023;
    double value = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    if (i & 0x8000) value = -value;
    wrong += value != value ? h[(size_t)i] == h[(size_t)i] : h[(size_t)i] != value || std::signbit(h[(size_t)i]) != (i >> 15 == 1);
  }
  check("safetensors: all 65536 FP16 numbers are read", wrong == 0, "%d wrong", wrong);
}

inline void test_bad_files(const std::string& dir) {
  std::string file = dir + "/bad.safetensors";
  auto entry = [](const char* name, const char* dtype, const char* shape, const char* offsets) {
    return std::string("\"") + name + "\": {\"dtype\": \"" + dtype + "\", \"shape\": " + shape + ", \"data_offsets\": " + offsets + "}";
  };
  struct Case { const char* what; std::string bytes; std::vector<std::string> parts; };
  std::string good = raw_safetensors("{" + entry("a.w", "F32", "[2]", "[0, 8]") + ", " + entry("b.w", "F32", "[1]", "[8, 12]") + "}", 12);
  std::vector<Case> cases = {
    {"an empty file", "", {"0 bytes"}},
    {"a file of 7 bytes", good.substr(0, 7), {"7 bytes"}},
    {"a file that ends in its header", good.substr(0, 40), {"truncated"}},
    {"a file that ends in its data", good.substr(0, good.size() - 1), {"'b.w'", "truncated"}},
    {"a file with bytes behind the data", good + "x", {"1 bytes behind"}},
    {"a header length of 2^63 + 5", std::string("\5\0\0\0\0\0\0\x80", 8) + "{}   ", {"header should have 9223372036854775813 bytes"}},
    {"a header length of 2^64 - 1", std::string(8, '\xff') + "{}   ", {"truncated"}},
    {"a text file", std::string("this is not a tensor file at all"), {"no safetensors file"}},
    {"a header that is not JSON", raw_safetensors("{\"a\": }", 0), {"not valid JSON", "byte 6"}},
    {"a header that is a list", raw_safetensors("[]", 0), {"not a JSON object"}},
    {"overlapping tensors", raw_safetensors("{" + entry("a.w", "F32", "[2]", "[0, 8]") + ", " + entry("b.w", "F32", "[2]", "[4, 12]") + "}", 12),
          {"'b.w'", "overlaps", "'a.w'"}},
    {"a gap between tensors", raw_safetensors("{" + entry("a.w", "F32", "[1]", "[0, 4]") + ", " + entry("b.w", "F32", "[1]", "[8, 12]") + "}", 12),
          {"'b.w'", "gap of 4"}},
    {"offsets past the end", raw_safetensors("{" + entry("a.w", "F32", "[2]", "[0, 8]") + "}", 4), {"'a.w'", "4 bytes"}},
    {"offsets that run backwards", raw_safetensors("{" + entry("a.w", "F32", "[0]", "[4, 0]") + "}", 4), {"'a.w'", "backwards"}},
    {"negative offsets", raw_safetensors("{" + entry("a.w", "F32", "[1]", "[-4, 0]") + "}", 4), {"'a.w'", "data_offsets"}},
    {"offsets beyond int64", raw_safetensors("{" + entry("a.w", "F32", "[1]", "[0, 99999999999999999999]") + "}", 4), {"'a.w'", "data_offsets"}},
    {"a shape that does not fit the offsets", raw_safetensors("{" + entry("a.w", "F32", "[3]", "[0, 8]") + "}", 8), {"'a.w'", "F32 [3]"}},
    {"a shape whose product overflows", raw_safetensors("{" + entry("a.w", "F32", "[4294967296, 4294967296, 4]", "[0, 0]") + "}", 0),
          {"'a.w'", "impossible"}},
    {"a shape with a fraction", raw_safetensors("{" + entry("a.w", "F32", "[1.5]", "[0, 4]") + "}", 4), {"'a.w'", "shape"}},
    {"a negative shape", raw_safetensors("{" + entry("a.w", "F32", "[-1]", "[0, 4]") + "}", 4), {"'a.w'", "shape"}},
    {"an unknown dtype", raw_safetensors("{" + entry("a.w", "F33", "[1]", "[0, 4]") + "}", 4), {"'a.w'", "unknown dtype 'F33'"}},
    {"no dtype", raw_safetensors("{\"a.w\": {\"shape\": [1], \"data_offsets\": [0, 4]}}", 4), {"'a.w'", "dtype"}},
    {"an entry that is a number", raw_safetensors("{\"a.w\": 3}", 0), {"'a.w'"}},
    {"a tensor listed twice", raw_safetensors("{" + entry("a.w", "F32", "[1]", "[0, 4]") + ", " + entry("a.w", "F32", "[1]", "[0, 4]") + "}", 4),
          {"'a.w'", "twice"}},
  };
  for (Case& c : cases) {
    put_file(file, c.bytes);
    c.parts.push_back(file);
    check_dies(std::string("safetensors: ") + c.what + " is refused", c.parts, [&] { SafetensorsReader r(file); });
  }
  check_dies("safetensors: a missing file is named", {dir + "/none.safetensors", "No such file"}, [&] { SafetensorsReader r(dir + "/none.safetensors"); });
  put_file(file, good);
  SafetensorsReader reader;
  bool ok = reader.open(file).empty();
  int refused = 0;
  for (size_t n = 0; n < good.size(); n++) { put_file(file, good.substr(0, n)); refused += !reader.open(file).empty(); }
  check("safetensors: a file cut at any byte is refused", ok && refused == (int)good.size(), "%d of %d", refused, (int)good.size());
  Rng rng(5);
  int opened = 0, outside = 0;
  for (int i = 0; i < 1500; i++) {                        // whatever opens must lie in the file and be readable
    std::string bytes = good;
    for (int k = rng.below(3); k >= 0; k--) bytes[(size_t)rng.below((int)bytes.size() - 12)] = (char)(rng.below(2) ? '0' + rng.below(10) : rng.below(256));
    put_file(file, bytes);
    if (!reader.open(file).empty()) continue;
    opened++;
    for (const SafeTensor& t : reader.tensors) {
      const MappedTensors& f = reader.files[(size_t)t.file];
      outside += t.data < f.data + 8 || t.data + t.bytes > f.data + f.size;
      std::vector<uint8_t> copy(t.bytes + 1);
      reader.read_raw(t.name, t.dtype.c_str(), t.shape, copy.data());
    }
  }
  check("safetensors: of 1500 files with random damage in the header, those that open have all tensors inside the file",
        opened > 0 && opened < 1500 && outside == 0,
        "%d opened", opened);
}

inline void write_one(const std::string& path, const std::vector<std::string>& names, float first) {
  SafetensorsWriter w(path);
  for (const std::string& name : names) w.declare(name, "F32", {2});
  for (size_t i = 0; i < names.size(); i++) { float x[2] = {first + (float)i, -1}; w.write_f32(x, 2); }
  w.finish();
}
inline void test_shards(const std::string& dir) {
  make_directories(dir + "/shards/");
  std::string s = dir + "/shards", index = s + "/model.safetensors.index.json";
  write_one(s + "/model-00001-of-00002.safetensors", {"a", "b"}, 1);
  write_one(s + "/model-00002-of-00002.safetensors", {"c"}, 3);
  auto put_index = [&](const char* a, const char* b, const char* c) {
    put_file(index, std::string("{\"metadata\": {\"total_size\": 24}, \"weight_map\": {\"a\": \"") + a + "\", \"b\": \"" + b + "\", \"c\": \"" +
          c + "\"}}");
  };
  const char *one = "model-00001-of-00002.safetensors", *two = "model-00002-of-00002.safetensors";
  put_index(one, one, two);
  {
    SafetensorsReader r(s);
    float a[2], c[2];
    r.read_f32("a", {2}, a);
    r.read_f32("c", {2}, c);
    check("safetensors: a model split over two files is read through its index", a[0] == 1 && c[0] == 3 && r.has("b"));
    check_dies("safetensors: a wrong shape in a shard names the shard", {two, "'c'"}, [&] { r.read_f32("c", {3}, a); });
  }
  put_index(one, two, two);
  check_dies("safetensors: a tensor that is not in the shard its index says is named", {index, "'b'", two}, [&] { SafetensorsReader r(s); });
  put_index(one, one, "model-00003.safetensors");
  check_dies("safetensors: a missing shard is named", {s + "/model-00003.safetensors"}, [&] { SafetensorsReader r(s); });
  put_index(one, one, "../secret.safetensors");
  check_dies("safetensors: an index that points out of its directory is refused", {index, "'c'"}, [&] { SafetensorsReader r(s); });
  put_file(index, "{\"weight_map\": 3}");
  check_dies("safetensors: an index without a weight_map is refused", {index, "weight_map"}, [&] { SafetensorsReader r(s); });
  write_one(s + "/" + two, {"a", "c"}, 3);
  put_index(one, one, two);
  check_dies("safetensors: a tensor in two shards is refused", {"'a'", one, two}, [&] { SafetensorsReader r(s); });
  make_directories(dir + "/bare");
  check_dies("safetensors: a directory without a model says what it looked for", {dir + "/bare", "model.safetensors.index.json"},
        [&] { SafetensorsReader r(dir + "/bare"); });
}

inline void test_writer_errors(const std::string& dir) {
  std::string file = dir + "/out.safetensors";
  float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  auto declared = [&](SafetensorsWriter& w) { w.declare("first", "F32", {2, 2}); w.declare("second", "BF16", {4}); };
  put_file(file, "the old file");
  check_dies("writer: too little data names the tensor", {file, "'second'", "4 of its 8 bytes"},
        [&] { SafetensorsWriter w(file); declared(w); w.write_f32(x, 4); w.write_f32(x, 2); w.finish(); });
  check_dies("writer: too much data is refused", {file, "more data"},
        [&] { SafetensorsWriter w(file); declared(w); w.write_f32(x, 4); w.write_f32(x, 4); w.write_f32(x, 1); });
  check_dies("writer: data across the border of a tensor is refused", {file, "'first'"},
        [&] { SafetensorsWriter w(file); declared(w); w.write_f32(x, 5); });
  check_dies("writer: floats into an integer tensor are refused", {file, "'n'", "I64"},
        [&] { SafetensorsWriter w(file); w.declare("n", "I64", {1}); w.write_f32(x, 1); });
  check_dies("writer: a name declared twice is refused", {file, "'first'", "twice"}, [&] { SafetensorsWriter w(file); declared(w); declared(w); });
  check_dies("writer: a directory that is not there is named", {dir + "/no/such", "No such file"}, [&] { SafetensorsWriter w(dir + "/no/such/file"); });
  check_dies("writer: a device is not replaced", {"/dev/null", "not a regular file"}, [&] { AtomicFile f("/dev/null"); });
  std::vector<float> big(1 << 20, 1.0f);
  auto write_big = [&](SafetensorsWriter& w) { w.declare("big", "F32", {1 << 20}); w.write_f32(big.data(), big.size()); w.finish(); };
  check_dies("writer: a full disk (/dev/full) is called by its name", {file, "disk full"}, [&] {
    SafetensorsWriter w(file);
    int full = open("/dev/full", O_WRONLY);
    dup2(full, w.file.fd);                         // the temporary file is now on a full disk
    write_big(w);
  });
  check_dies("writer: a file size limit in the middle of the data is an error", {file, "too large"}, [&] {
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {1 << 20, 1 << 20};
    setrlimit(RLIMIT_FSIZE, &limit);
    SafetensorsWriter w(file);
    write_big(w);
  });
  check("writer: after all these errors the old file stands untouched and no temporary is left", get_file(file) == "the old file" &&
        count_hidden(dir) == 0);
  { SafetensorsWriter w(file); declared(w); w.write_f32(x, 4); }
  check("writer: one that is given up leaves no trace", get_file(file) == "the old file" && count_hidden(dir) == 0);
  write_file_atomic(dir + "/small.txt", "one\n");
  write_file_atomic(dir + "/small.txt", "two\n");
  check("small files are replaced whole", get_file(dir + "/small.txt") == "two\n" && count_hidden(dir) == 0);
}

// ---------------------------------------------------------------------------------------------------------------- config.json

inline bool same_config(const ModelConfig& a, const ModelConfig& b) {
  return a.llama == b.llama && a.layers == b.layers && a.channels == b.channels && a.heads == b.heads && a.kv_heads == b.kv_heads &&
        a.head_dim == b.head_dim &&
         a.ffn == b.ffn && a.vocab == b.vocab && a.max_seq == b.max_seq && a.norm_eps == b.norm_eps && a.rope_theta == b.rope_theta && a.tied == b.tied &&
         a.bos == b.bos && a.eos == b.eos;
}
inline ModelConfig example_config(bool llama) {
  ModelConfig c;
  c.llama = llama;
  c.layers = 12; c.channels = 768; c.heads = 12; c.kv_heads = llama ? 4 : 12; c.head_dim = llama ? 96 : 64; c.ffn = llama ? 2048 : 3072;
  c.vocab = 50257; c.max_seq = 1024; c.norm_eps = llama ? 1e-6f : 1e-5f; c.rope_theta = llama ? 500000.0f : 0; c.tied = !llama; c.bos = 50256;
        c.eos = llama ? -1 : 50256;
  return c;
}
inline void test_config(const std::string& dir) {
  for (bool llama : {false, true}) {
    write_config(dir, example_config(llama));
    check(std::string("config: a ") + (llama ? "Llama" : "GPT-2") + " comes back from its config.json",
          same_config(read_config(dir), example_config(llama)));
  }
  // As the files on the Hugging Face hub are: defaults left out, transformers 4 and 5 spellings.
  const std::string gpt2 = "\"model_type\": \"gpt2\", \"n_layer\": 12, \"n_embd\": 768, \"n_head\": 12, \"n_positions\": 1024, \"n_ctx\": 1024, \"vocab_size\": 50257";
  const std::string llama = "\"model_type\": \"llama\", \"num_hidden_layers\": 2, \"hidden_size\": 64, \"num_attention_heads\": 4, \"intermediate_size\": 172, "
                            "\"max_position_embeddings\": 512, \"vocab_size\": 512";
  auto read = [&](const std::string& text) { put_file(dir + "/config.json", "{" + text + "}"); return read_config(dir); };
  ModelConfig c = read(gpt2 + ", \"activation_function\": \"gelu_new\", \"n_inner\": null, \"attn_pdrop\": 0.1, \"bos_token_id\": 50256, \"eos_token_id\": 50256");
  check("config: GPT-2 as first published is understood", !c.llama && c.ffn == 3072 && c.head_dim == 64 && c.kv_heads == 12 && c.tied &&
        c.norm_eps == 1e-5f && c.eos == 50256);
  c = read(llama);
  check("config: Llama's defaults are those of transformers", c.llama && c.kv_heads == 4 && c.head_dim == 16 && c.rope_theta == 10000 &&
        c.norm_eps == 1e-6f && !c.tied && c.bos == -1);
  c = read(llama + ", \"num_key_value_heads\": 2, \"head_dim\": 32, \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 500000.0}, \"rope_scaling\": null, "
           "\"hidden_act\": \"silu\", \"tie_word_embeddings\": true, \"attention_bias\": false, \"eos_token_id\": [7, 8]");
  check("config: Llama as transformers 5 writes it is understood", c.kv_heads == 2 && c.head_dim == 32 && c.rope_theta == 500000 && c.tied && c.eos == 7);
  check("config: GPT-2 with its own MLP width is understood", read(gpt2 +
        ", \"n_inner\": 1000, \"activation_function\": \"gelu_pytorch_tanh\"").ffn == 1000);

  struct Case { const char* what; std::string text; std::vector<std::string> parts; };
  std::vector<Case> cases = {
    {"another model", "\"model_type\": \"qwen3\"", {"model_type", "qwen3"}}, {"no model_type", "\"n_layer\": 3", {"model_type"}},
    {"the exact GELU", gpt2 + ", \"activation_function\": \"gelu\"", {"activation_function", "'gelu'"}},
    {"attention scaled by the layer", gpt2 + ", \"scale_attn_by_inverse_layer_idx\": true", {"scale_attn_by_inverse_layer_idx"}},
    {"unscaled attention", gpt2 + ", \"scale_attn_weights\": false", {"scale_attn_weights"}},
    {"cross attention", gpt2 + ", \"add_cross_attention\": true", {"add_cross_attention"}},
    {"stretched positions (transformers 4)", llama + ", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}", {"rope_scaling", "'linear'"}},
    {"stretched positions (transformers 5)", llama + ", \"rope_parameters\": {\"rope_type\": \"llama3\", \"rope_theta\": 1e4}",
          {"rope_parameters", "'llama3'"}},
    {"biases in attention", llama + ", \"attention_bias\": true", {"attention_bias"}}, {"biases in the MLP", llama + ", \"mlp_bias\": true", {"mlp_bias"}},
    {"another activation", llama + ", \"hidden_act\": \"gelu\"", {"hidden_act", "'gelu'"}},
    {"quantized weights", llama + ", \"quantization_config\": {\"quant_method\": \"mxfp4\"}", {"quantization_config"}},
    {"a missing size", "\"model_type\": \"gpt2\", \"n_layer\": 12", {"no 'n_embd'"}},
    {"a size in quotes", "\"model_type\": \"gpt2\", \"n_layer\": \"12\"", {"'n_layer'", "a string", "a number"}},
    {"a size that is no whole number", "\"model_type\": \"gpt2\", \"n_layer\": 1.5", {"'n_layer'"}},
    {"a size of zero", "\"model_type\": \"gpt2\", \"n_layer\": 0, \"n_embd\": 64, \"n_head\": 4, \"n_positions\": 8, \"vocab_size\": 9", {"layers is 0"}},
    {"no heads", "\"model_type\": \"gpt2\", \"n_layer\": 1, \"n_embd\": 64, \"n_head\": 0, \"n_positions\": 8, \"vocab_size\": 9", {"heads is 0"}},
    {"heads that do not divide the channels", "\"model_type\": \"gpt2\", \"n_layer\": 1, \"n_embd\": 64, \"n_head\": 5, \"n_positions\": 8, \"vocab_size\": 9", {"64", "5 heads"}},
    {"heads that do not share evenly", llama + ", \"num_key_value_heads\": 3", {"4 heads", "3 key/value"}},
    {"heads wider than attention takes", llama + ", \"head_dim\": 256", {"256", "8 to 128"}},
    {"broken JSON", "\"model_type\": ", {"not valid JSON", "byte"}},
  };
  for (Case& t : cases) {
    t.parts.push_back(dir + "/config.json");
    check_dies(std::string("config: ") + t.what + " is refused", t.parts, [&] { read(t.text); });
  }
  check_dies("config: a missing file is named", {dir + "/none/config.json"}, [&] { read_config(dir + "/none"); });

  std::string fixtures = "dev/fixtures";
  if (!exists(fixtures + "/gpt2/config.json")) { skip("config: the directories saved by transformers are understood", "no dev/fixtures here"); return; }
  for (const char* name : {"gpt2", "llama", "llama_tied"}) {
    c = read_config(fixtures + "/" + name);
    SafetensorsReader r(fixtures + "/" + name);
    const std::vector<int64_t>& shape = r.shape(c.llama ? "model.embed_tokens.weight" : gpt2_prefix(r) + "wte.weight");
    write_config(dir, c);
    check(std::string("config: what transformers saved in fixtures/") + name + " is understood and comes back",
          shape[0] == c.vocab && shape[1] == c.channels && same_config(c, read_config(dir)) && r.has("lm_head.weight") == !c.tied);
  }
}

// ---------------------------------------------------------------------------------------------------------------- directories

// A small checkpoint in which everything says its number, so that a mixture of two is seen.
inline void save_checkpoint(const std::string& path, float number, bool can_exchange = true) {
  AtomicDirectory dir(path);
  dir.can_exchange = can_exchange;
  write_config(dir.path(), example_config(false));
  for (const char* name : {"/model.safetensors", "/trainer_state.safetensors"}) {
    SafetensorsWriter w(dir.path() + name);
    std::vector<float> x(3000, number);
    w.declare("x", "F32", {3000});
    w.write_f32(x.data(), x.size());
    w.finish();
  }
  dir.commit();
}
// The number of a checkpoint; -1 if its files do not agree or cannot be read.
inline float checkpoint_number(const std::string& path) {
  if (path.empty() || !checkpoint_problem(path).empty()) return -1;
  std::vector<float> x(6000);
  SafetensorsReader(path + "/model.safetensors").read_f32("x", {3000}, x.data());
  SafetensorsReader(path + "/trainer_state.safetensors").read_f32("x", {3000}, x.data() + 3000);
  for (float f : x) if (f != x[0]) return -1;
  return x[0];
}

inline void test_directories(const std::string& dir) {
  std::string run = dir + "/deep/er/run", step = step_directory(run, 100);
  {
    AtomicDirectory d(step + "/");
    put_file(d.path() + "/config.json", "{}");
    check("directory: nothing is under the final name before commit()", !exists(step) && count_hidden(run) == 1);
  }
  check("directory: one that is given up leaves no trace", !exists(step) && count_hidden(run) == 0);
  save_checkpoint(step, 1);
  check("directory: after commit() it is there, whole", checkpoint_number(step) == 1 && count_hidden(run) == 0 && step == run + "/step_000100");
  for (bool exchange : {true, false}) {
    save_checkpoint(step, 2 + exchange, exchange);
    check(std::string("directory: an old one is replaced ") + (exchange ? "by exchanging the names" : "without the exchange"),
          checkpoint_number(step) == 2 + exchange && count_hidden(run) == 0);
    put_file(step + "/notes.txt", "mine");
    ChildResult r = in_child([&] { save_checkpoint(step, 5 + exchange, exchange); });
    std::string kept = step + (exchange ? ".kept-1" : ".kept-2");
    check("directory: an old one with a user's file is kept under another name", r.exit_code == 0 && contains(r.output, kept) &&
          checkpoint_number(step) == 5 + exchange && get_file(kept + "/notes.txt") == "mine" && checkpoint_number(kept) == 2 + exchange && count_hidden(run) == 0);
  }
  put_file(run + "/file", "x");
  check_dies("directory: a file is not replaced by a directory", {run + "/file"}, [&] { AtomicDirectory d(run + "/file"); });
  check_dies("directory: a name is needed", {"needs a name"}, [&] { AtomicDirectory d("/"); });
  // a symbolic link to a directory on another disk stays a link
  save_checkpoint(dir + "/elsewhere", 1);
  (void)!symlink((dir + "/elsewhere").c_str(), (run + "/link").c_str());
  save_checkpoint(run + "/link", 2);
  struct stat st;
  check("directory: through a symbolic link the target is replaced", lstat((run + "/link").c_str(), &st) == 0 && S_ISLNK(st.st_mode) &&
        checkpoint_number(dir + "/elsewhere") == 2);
}

inline void test_find_and_prune(const std::string& dir) {
  std::string run = dir + "/prune";
  check("find: no directory, no checkpoint", find_newest_checkpoint(run).empty());
  for (int64_t n : {5, 90, 999999, 1000000, 2000000}) save_checkpoint(step_directory(run, n), (float)n);
  check("find: the newest is the largest number, with 7 digits too", find_newest_checkpoint(run) == run + "/step_2000000");
  std::string newest = run + "/step_2000000/";
  std::string whole = get_file(newest + "trainer_state.safetensors");
  put_file(newest + "trainer_state.safetensors", whole.substr(0, whole.size() - 1));
  check("find: a truncated state is passed over", find_newest_checkpoint(run) == run + "/step_1000000");
  put_file(newest + "trainer_state.safetensors", whole);
  rename((newest + "config.json").c_str(), (newest + "moved").c_str());
  check("find: a missing config.json is passed over", find_newest_checkpoint(run) == run + "/step_1000000");
  make_directories(run + "/step_9999999");
  make_directories(run + "/step_00000x");
  make_directories(run + "/step_3");
  check("find: empty directories and other names are passed over", find_newest_checkpoint(run) == run + "/step_1000000");
  put_file(run + "/step_000090/mine.txt", "x");
  check("prune: keep 0 removes nothing", prune_checkpoints(run, 0) == 0);
  int removed = prune_checkpoints(run, 1);
  check("prune: all complete ones but the newest go; a user's file keeps its directory", removed == 2 && !exists(run + "/step_000005") &&
        exists(run + "/step_000090/config.json") &&
        !exists(run + "/step_999999") && checkpoint_number(run + "/step_1000000") == 1000000 && exists(newest + "moved") &&
              exists(run + "/step_9999999") && count_hidden(run) == 0,
        "%d removed", removed);
}

inline void test_clean_stale(const std::string& dir) {
  std::string run = dir + "/stale";
  make_directories(run);
  // what a killed run leaves: a directory half written, a file, a replacement cut short before and after its second rename
  in_child([&] {
    AtomicDirectory d(run + "/step_000007");
    write_config(d.path(), example_config(true));
    AtomicFile inside(d.path() + "/model.safetensors");
    AtomicFile f(run + "/log.csv");
    f.write("half", 4);
    _exit(0);
  });
  save_checkpoint(run + "/step_000001", 1);
  save_checkpoint(run + "/step_000002", 2);
  save_checkpoint(run + "/step_000004", 4);
  rename((run + "/step_000001").c_str(), (run + "/" + kReplacedPrefix + "0.step_000001").c_str());
  rename((run + "/step_000004").c_str(), (run + "/" + kReplacedPrefix + "0.step_000002").c_str());
  // what is a user's
  std::string mine[] = {".train_fp4-notes", ".train_fp4-tmp.", ".train_fp4-tmp.x.step_1", ".hidden", "step_000003.tmp", ".train_fp4-tmp.5"};
  for (const std::string& name : mine) put_file(run + "/" + name, "mine");
  make_directories(run + "/" + kTemporaryPrefix + "3.step_000009/sub");
  put_file(run + "/" + kTemporaryPrefix + "3.step_000009/thesis.txt", "mine");
  // what a living run is writing
  int to_parent[2], to_child[2];
  if (pipe(to_parent) || pipe(to_child)) die("no pipe");
  pid_t pid = fork();
  if (pid == 0) {
    AtomicDirectory d(run + "/step_000008");
    AtomicFile f(run + "/live.csv");
    char c = 'r';
    (void)!write(to_parent[1], &c, 1);
    (void)!read(to_child[0], &c, 1);
    _exit(0);
  }
  char c;
  (void)!read(to_parent[0], &c, 1);
  ChildResult r = in_child([&] { clean_stale(run); });
  check("stale: the temporaries of a killed run are gone", r.exit_code == 0 && !exists(run + "/" + kTemporaryPrefix + "0.step_000007") &&
        !exists(run + "/" + kTemporaryPrefix + "0.log.csv"));
  check("stale: a replaced checkpoint whose successor never came is back", checkpoint_number(run + "/step_000001") == 1);
  check("stale: a replaced checkpoint whose successor is there is gone", checkpoint_number(run + "/step_000002") == 2 &&
        !exists(run + "/" + kReplacedPrefix + "0.step_000002"));
  bool kept = true;
  for (const std::string& name : mine) kept = kept && get_file(run + "/" + name) == "mine";
  check("stale: a user's files stay, even with similar names", kept);
  check("stale: a temporary directory with a user's file is kept under a visible name", get_file(run + "/step_000009.kept-1/thesis.txt") == "mine",
        "%s", r.output.c_str());
  check("stale: what a living run is writing stays", exists(run + "/" + kTemporaryPrefix + "0.step_000008") &&
        exists(run + "/" + kTemporaryPrefix + "0.live.csv"));
  (void)!write(to_child[1], &c, 1);
  int status;
  waitpid(pid, &status, 0);
  clean_stale(run);
  check("stale: and goes when that run has died", !exists(run + "/" + kTemporaryPrefix + "0.step_000008") &&
        !exists(run + "/" + kTemporaryPrefix + "0.live.csv"));
  for (int fd : {to_parent[0], to_parent[1], to_child[0], to_child[1]}) close(fd);
}

// A child saves without end and reports each commit; the parent kills it anywhere. Even rounds: new steps, the last two kept. Odd
// rounds: the same step again and again, with and without the exchange.
inline void test_kill_while_saving(const std::string& dir) {
  std::string run = dir + "/kill";
  Rng rng((uint64_t)getpid());
  float number = 1, newest_step = 1;
  save_checkpoint(step_directory(run, 1), number);
  int whole = 0, cut = 0, rounds = 20;
  for (int round = 0; round < rounds; round++) {
    int reports[2];
    if (pipe(reports)) die("no pipe");
    pid_t pid = fork();
    if (pid == 0) {
      close(reports[0]);
      for (float n = number + 1;; n++) {
        float step = round % 2 ? newest_step : newest_step + (n - number);
        save_checkpoint(step_directory(run, (int64_t)step), n, round % 4 != 3);
        float report[2] = {n, step};
        if (write(reports[1], report, sizeof report) != sizeof report) _exit(1);
        if (round % 2 == 0) prune_checkpoints(run, 2);
      }
    }
    close(reports[1]);
    usleep((useconds_t)(1000 + rng.below(60000)));
    kill(pid, SIGKILL);
    int status;
    waitpid(pid, &status, 0);
    float report[2];
    while (read(reports[0], report, sizeof report) == sizeof report) { number = report[0]; newest_step = report[1]; }
    close(reports[0]);
    cut += count_hidden(run) > 0;
    if (round % 4 == 3) clean_stale(run);     // without the exchange the old one may have to be brought back first, as at every start
    float found = checkpoint_number(find_newest_checkpoint(run));
    clean_stale(run);
    bool ok = found >= number && found <= number + 1 && checkpoint_number(find_newest_checkpoint(run)) == found && count_hidden(run) == 0;
    if (!ok) printf("       round %d: reported %g, found %g, hidden %d\n", round, number, found, count_hidden(run));
    whole += ok;
    number = std::max(number, found);
    newest_step = (float)step_of_name(base_name(find_newest_checkpoint(run)));
  }
  check("kill: 20 times SIGKILL while saving, and each time the newest checkpoint is whole, not older than the last one reported saved, and nothing stale stays",
        whole == rounds, "%d of %d, %d of them cut in the middle of a save, %g saves", whole, rounds, cut, number);
}

}  // namespace checkpoint_tests

inline void test_checkpoint() {
  using namespace checkpoint_tests;
  if (!section("checkpoints: json, safetensors, config.json, atomic directories")) return;
  TempDirectory dir;
  test_json();
  test_round_trip(dir.path);
  test_bad_files(dir.path);
  test_shards(dir.path);
  test_writer_errors(dir.path);
  test_config(dir.path);
  test_directories(dir.path);
  test_find_and_prune(dir.path);
  test_clean_stale(dir.path);
  test_kill_while_saving(dir.path);
}
