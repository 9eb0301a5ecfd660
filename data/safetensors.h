// data/safetensors.h -- reading and writing the tensor files of Hugging Face.
//
// The format: uint64 n (little-endian), n bytes of JSON, then the data. The JSON names every tensor:
//   {"__metadata__": {"format": "pt"}, "wte.weight": {"dtype": "F32", "shape": [50257, 768], "data_offsets": [0, 154389504]}, ...}
// Offsets count from the end of the JSON; the tensors cover the data without gap or overlap. A model may be split over several
// files; model.safetensors.index.json then says which tensor is in which file.
//
// A file comes from anywhere, so the reader believes nothing: every length and offset is checked against the size of the file
// before a byte of data is touched. The writer writes to a temporary name beside the file and renames when all is on the disk,
// so that under its own name a file is always whole. (Little-endian machines only, like everything CUDA runs on.)
#pragma once
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <map>
#include "json.h"

// ----------------------------------------------------------------------------------------------------------------------------
// Number formats of a file. Conversions here are for the host and for files; kernels have their own.

// Bits of one element; 0 if the name is unknown.
inline int dtype_bits(const std::string& dtype) {
  static const std::map<std::string, int> bits = {
    {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16}, {"U16", 16}, {"F16", 16}, {"BF16", 16},
    {"I32", 32}, {"U32", 32}, {"F32", 32}, {"I64", 64}, {"U64", 64}, {"F64", 64}, {"C64", 64}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}};
  auto at = bits.find(dtype);
  return at == bits.end() ? 0 : at->second;
}
inline float float_of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

inline float bf16_bits_to_float(uint16_t h) { return float_of_bits((uint32_t)h << 16); }
inline uint16_t float_to_bf16_bits(float x) {   // round to nearest, ties to even; a NaN stays a NaN
  uint32_t b = bits_of_float(x);
  if (x != x) return (uint16_t)(b >> 16 | 0x40);
  return (uint16_t)((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
inline float f16_bits_to_float(uint16_t h) {    // exact: every half is a float
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3FF;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000 | fraction << 13);
  float magnitude = exponent ? float_of_bits((exponent + 112) << 23 | fraction << 13) : (float)fraction * 0x1p-24f;
  return float_of_bits(sign | bits_of_float(magnitude));
}

// "[2, 3]", for messages.
inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}
// Number of elements, or -1 if that does not fit in 2^60 or a dimension is negative.
inline int64_t shape_elements(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  bool zero = false;
  for (int64_t d : shape) {
    if (d < 0 || d > (int64_t)1 << 60) return -1;
    if (d == 0) { zero = true; continue; }
    if (n > ((int64_t)1 << 60) / d) return -1;
    n *= d;
  }
  return zero ? 0 : n;
}

// ----------------------------------------------------------------------------------------------------------------------------
// Reader

// A file mapped read-only. Pages are read when touched, so a large model is never in memory twice.
struct MappedTensors {
  std::string path;
  const uint8_t* data = nullptr;
  size_t size = 0;
};
struct SafeTensor {
  std::string name, dtype;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;   // inside the mapping; may be unaligned
  size_t bytes = 0;
  int file = 0;                    // which of the reader's files
};

struct SafetensorsReader {
  std::string path;                // as given: for messages
  std::vector<MappedTensors> files;
  std::vector<SafeTensor> tensors;
  std::map<std::string, size_t> index;               // name -> position in tensors
  std::map<std::string, std::string> metadata;

  SafetensorsReader() {}
  // Opens one .safetensors file, or a directory with model.safetensors or model.safetensors.index.json. Dies if it is not sound.
  explicit SafetensorsReader(const std::string& path) {
    std::string problem = open(path);
    if (!problem.empty()) die("%s", problem.c_str());
  }
  ~SafetensorsReader() { close(); }
  SafetensorsReader(const SafetensorsReader&) = delete;
  SafetensorsReader& operator=(const SafetensorsReader&) = delete;

  // The same without dying: returns what is wrong, empty if nothing.
  std::string open(const std::string& path);
  void close();

  bool has(const std::string& name) const { return index.count(name) != 0; }
  const SafeTensor* find(const std::string& name) const {   // nullptr if absent
    auto at = index.find(name);
    return at == index.end() ? nullptr : &tensors[at->second];
  }
  const std::vector<int64_t>& shape(const std::string& name) const { return get(name).shape; }

  // The whole tensor as floats, from F32, BF16 or F16. Dies if it is absent, or of another shape or dtype.
  void read_f32(const std::string& name, const std::vector<int64_t>& expected_shape, float* dst) const;
  // Rows [first, first + count) of it, i.e. of its outermost dimension.
  void read_rows_f32(const std::string& name, const std::vector<int64_t>& expected_shape, int64_t first, int64_t count, float* dst) const;
  // The bytes as they stand, for integers: dtype "I32", "I64", "U8", ... must be the file's.
  void read_raw(const std::string& name, const char* dtype, const std::vector<int64_t>& expected_shape, void* dst) const;

  // Details
  std::string map_file(const std::string& path);
  std::string read_header(int file);
  std::string open_index(const std::string& directory);
  const SafeTensor& get(const std::string& name) const;
  const SafeTensor& get(const std::string& name, const std::vector<int64_t>& expected_shape) const;
};

inline void SafetensorsReader::close() {
  for (MappedTensors& f : files) if (f.data) munmap((void*)f.data, f.size);
  files.clear(); tensors.clear(); index.clear(); metadata.clear();
}

inline std::string SafetensorsReader::open(const std::string& where) {
  close();
  path = where;
  struct stat st;
  if (stat(path.c_str(), &st)) return "cannot open " + path + ": " + strerror(errno);
  std::string problem;
  if (!S_ISDIR(st.st_mode)) problem = map_file(path);
  else if (stat((path + "/model.safetensors").c_str(), &st) == 0) problem = map_file(path + "/model.safetensors");
  else if (stat((path + "/model.safetensors.index.json").c_str(), &st) == 0) problem = open_index(path);
  else problem = "no model.safetensors and no model.safetensors.index.json in " + path;
  if (!problem.empty()) close();
  return problem;
}

inline std::string SafetensorsReader::map_file(const std::string& file_path) {
  int fd = ::open(file_path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return "cannot open " + file_path + ": " + strerror(errno);
  struct stat st;
  if (fstat(fd, &st) || !S_ISREG(st.st_mode)) { ::close(fd); return file_path + " is not a regular file"; }
  MappedTensors f;
  f.path = file_path;
  f.size = (size_t)st.st_size;
  if (f.size < 8) {
    ::close(fd);
    return file_path + " is truncated or no safetensors file: it has " + std::to_string(f.size) + " bytes, the header's length alone takes 8";
  }
  void* data = mmap(nullptr, f.size, PROT_READ, MAP_PRIVATE, fd, 0);
  int error = errno;
  ::close(fd);
  if (data == MAP_FAILED) return "cannot map " + file_path + ": " + strerror(error);
  f.data = (const uint8_t*)data;
  files.push_back(f);
  return read_header((int)files.size() - 1);
}

// One entry of the header -> tensor. Returns what is wrong with it.
inline std::string safetensors_entry(const Json& entry, size_t data_bytes, SafeTensor* t, size_t* begin, size_t* end) {
  const Json* dtype = entry.find("dtype");
  const Json* shape = entry.find("shape");
  const Json* offsets = entry.find("data_offsets");
  if (!dtype || dtype->kind != Json::kString) return "has no dtype";
  if (!shape || shape->kind != Json::kArray) return "has no shape";
  if (!offsets || offsets->kind != Json::kArray || offsets->items.size() != 2) return "has no pair of data_offsets";
  t->dtype = dtype->string;
  int bits = dtype_bits(t->dtype);
  if (!bits) return "has the unknown dtype '" + t->dtype + "'";
  for (const Json& d : shape->items) {
    if (!d.is_integer || d.integer < 0) return "has a shape that is not made of whole numbers from 0";
    t->shape.push_back(d.integer);
  }
  int64_t n = shape_elements(t->shape);
  if (n < 0 || n > ((int64_t)1 << 60) / bits) return "has the impossible shape " + shape_text(t->shape);
  for (const Json& o : offsets->items) if (!o.is_integer || o.integer < 0) return "has data_offsets that are not whole numbers from 0";
  *begin = (size_t)offsets->items[0].integer;
  *end = (size_t)offsets->items[1].integer;
  std::string span = "[" + std::to_string(*begin) + ", " + std::to_string(*end) + "]";
  if (*begin > *end) return "has data_offsets " + span + " that run backwards";
  if (*end > data_bytes) return "has data_offsets " + span + ", but the file holds " + std::to_string(data_bytes) + " bytes of data: truncated?";
  if ((uint64_t)n * (uint64_t)bits != (uint64_t)(*end - *begin) * 8)
    return "has data_offsets " + span + ", which does not fit " + t->dtype + " " + shape_text(t->shape);
  t->bytes = *end - *begin;
  return "";
}

inline std::string SafetensorsReader::read_header(int file) {
  const MappedTensors& f = files[(size_t)file];
  uint64_t header_bytes;
  memcpy(&header_bytes, f.data, 8);
  if (header_bytes > f.size - 8)
    return f.path + " is truncated or no safetensors file: its header should have " + std::to_string(header_bytes) + " bytes, the file has " +
          std::to_string(f.size);
  Json header;
  std::string problem;
  if (!json_parse((const char*)f.data + 8, (size_t)header_bytes, &header, &problem)) return f.path + " has a header that is not valid JSON: " + problem;
  if (header.kind != Json::kObject) return f.path + " has a header that is not a JSON object";
  const uint8_t* data = f.data + 8 + header_bytes;
  size_t data_bytes = f.size - 8 - (size_t)header_bytes;

  struct Span { size_t begin, end; std::string name; };
  std::vector<Span> spans;
  for (size_t i = 0; i < header.keys.size(); i++) {
    const std::string& name = header.keys[i];
    if (name == "__metadata__") {
      for (size_t j = 0; j < header.items[i].keys.size(); j++) metadata[header.items[i].keys[j]] = header.items[i].items[j].string;
      continue;
    }
    SafeTensor t;
    Span span{0, 0, name};
    problem = safetensors_entry(header.items[i], data_bytes, &t, &span.begin, &span.end);
    if (!problem.empty()) return f.path + ": tensor '" + name + "' " + problem;
    if (has(name)) return f.path + ": tensor '" + name + "' is also in " + files[(size_t)get(name).file].path;
    t.name = name;
    t.data = data + span.begin;
    t.file = file;
    index[name] = tensors.size();
    tensors.push_back(t);
    spans.push_back(span);
  }
  // No overlap, no gap, nothing behind the last: a file that was written to the end.
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  size_t at = 0;
  for (size_t i = 0; i < spans.size(); i++) {
    if (spans[i].begin < at) return f.path + ": tensor '" + spans[i].name + "' overlaps tensor '" + spans[i - 1].name + "'";
    if (spans[i].begin > at) return f.path + ": tensor '" + spans[i].name + "' starts behind a gap of " + std::to_string(spans[i].begin - at) + " bytes";
    at = spans[i].end;
  }
  if (at != data_bytes) return f.path + " has " + std::to_string(data_bytes - at) + " bytes behind its last tensor";
  return "";
}

inline std::string SafetensorsReader::open_index(const std::string& directory) {
  std::string index_path = directory + "/model.safetensors.index.json", problem;
  Json json;
  if (!json_parse_file(index_path, &json, &problem)) return problem;
  const Json* map = json.find("weight_map");
  if (!map || map->kind != Json::kObject || map->keys.empty()) return index_path + " has no weight_map";
  std::map<std::string, int> opened;                 // file name -> its position in files
  for (size_t i = 0; i < map->keys.size(); i++) {
    const Json& file = map->items[i];
    if (file.kind != Json::kString || file.string.empty() || file.string.find('/') != std::string::npos || file.string == "..")
      return index_path + ": tensor '" + map->keys[i] + "' is said to be in something that is no file name of this directory";
    if (opened.count(file.string)) continue;
    opened[file.string] = (int)files.size();
    problem = map_file(directory + "/" + file.string);
    if (!problem.empty()) return problem;
  }
  for (size_t i = 0; i < map->keys.size(); i++) {
    const SafeTensor* t = find(map->keys[i]);
    if (!t || t->file != opened[map->items[i].string])
      return index_path + ": tensor '" + map->keys[i] + "' is said to be in " + map->items[i].string + ", which does not have it";
  }
  return "";
}

inline const SafeTensor& SafetensorsReader::get(const std::string& name) const {
  const SafeTensor* t = find(name);
  if (!t) die("%s has no tensor '%s'", path.c_str(), name.c_str());
  return *t;
}
inline const SafeTensor& SafetensorsReader::get(const std::string& name, const std::vector<int64_t>& expected_shape) const {
  const SafeTensor& t = get(name);
  if (t.shape != expected_shape)
    die("%s: tensor '%s' has shape %s, expected %s", files[(size_t)t.file].path.c_str(), name.c_str(), shape_text(t.shape).c_str(),
          shape_text(expected_shape).c_str());
  return t;
}

inline void SafetensorsReader::read_f32(const std::string& name, const std::vector<int64_t>& expected_shape, float* dst) const {
  if (expected_shape.empty()) { read_rows_f32(name, expected_shape, 0, 1, dst); return; }   // a scalar is one row
  read_rows_f32(name, expected_shape, 0, expected_shape[0], dst);
}
inline void SafetensorsReader::read_rows_f32(const std::string& name, const std::vector<int64_t>& expected_shape, int64_t first, int64_t count,
                                             float* dst) const {
  const SafeTensor& t = get(name, expected_shape);
  const char* file = files[(size_t)t.file].path.c_str();
  int64_t rows = t.shape.empty() ? 1 : t.shape[0];
  if (first < 0 || count < 0 || first > rows || count > rows - first)
    die("%s: tensor '%s' has %lld rows, asked for %lld from row %lld", file, name.c_str(), (long long)rows, (long long)count, (long long)first);
  if (t.dtype != "F32" && t.dtype != "BF16" && t.dtype != "F16")
    die("%s: tensor '%s' has dtype %s; weights are read from F32, BF16 or F16", file, name.c_str(), t.dtype.c_str());
  if (rows == 0) return;
  size_t width = (size_t)(shape_elements(t.shape) / rows), n = width * (size_t)count, size = t.dtype == "F32" ? 4 : 2;
  if (n == 0) return;
  const uint8_t* src = t.data + (size_t)first * width * size;
  if (size == 4) { memcpy(dst, src, n * 4); return; }
  bool brain = t.dtype == "BF16";
  for (size_t i = 0; i < n; i++) {
    uint16_t h;
    memcpy(&h, src + 2 * i, 2);
    dst[i] = brain ? bf16_bits_to_float(h) : f16_bits_to_float(h);
  }
}
inline void SafetensorsReader::read_raw(const std::string& name, const char* dtype, const std::vector<int64_t>& expected_shape, void* dst) const {
  const SafeTensor& t = get(name, expected_shape);
  if (t.dtype != dtype) die("%s: tensor '%s' has dtype %s, expected %s", files[(size_t)t.file].path.c_str(), name.c_str(), t.dtype.c_str(), dtype);
  if (t.bytes) memcpy(dst, t.data, t.bytes);
}

// ----------------------------------------------------------------------------------------------------------------------------
// A file that appears whole or not at all: written under a temporary name beside it, flushed to the disk, renamed.

// Temporary names look like ".train_fp4-tmp.0.model.safetensors". While their program runs they are locked (flock), which is how
// clean_stale() in checkpoint.h tells the leftovers of a killed run from the files of a running one.
constexpr const char* kTemporaryPrefix = ".train_fp4-tmp.";
constexpr const char* kReplacedPrefix = ".train_fp4-old.";     // see AtomicDirectory

inline std::string parent_directory(const std::string& path) {
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}
inline std::string base_name(const std::string& path) {
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}
// The n-th hidden name beside path.
inline std::string hidden_sibling(const std::string& path, const char* prefix, int n) {
  return parent_directory(path) + "/" + prefix + std::to_string(n) + "." + base_name(path);
}
// The system's words for errno, with the plain ones first where somebody has to act.
inline std::string write_error_text(int error) {
  if (error == ENOSPC || error == EDQUOT) return std::string("disk full (") + strerror(error) + "); free some space or write elsewhere";
  if (error == EFBIG) return std::string("file too large for this file system or ulimit -f (") + strerror(error) + ")";
  return strerror(error);
}
// Flushes a file or directory to the disk. 0 or an errno. (Some file systems cannot flush a directory: that is no error.)
inline int flush_path(const std::string& path, bool directory) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | (directory ? O_DIRECTORY : 0));
  if (fd < 0) return errno;
  int error = fsync(fd) ? errno : 0;
  close(fd);
  return directory && error == EINVAL ? 0 : error;
}

struct AtomicFile {
  std::string path, temporary;
  int fd = -1;

  // Dies if the file cannot be created there, or if path is something a rename should not replace (a directory, /dev/null).
  explicit AtomicFile(const std::string& path) : path(path) {
    struct stat st;
    if (stat(path.c_str(), &st) == 0 && !S_ISREG(st.st_mode)) die("cannot write %s: it exists and is not a regular file", path.c_str());
    for (int n = 0; fd < 0; n++) {
      temporary = hidden_sibling(path, kTemporaryPrefix, n);
      fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd < 0 && (errno != EEXIST || n == 10000)) die("cannot write %s: %s", path.c_str(), write_error_text(errno).c_str());
    }
    (void)flock(fd, LOCK_EX | LOCK_NB);
  }
  ~AtomicFile() { discard(); }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void discard() {
    if (fd < 0) return;
    close(fd);
    unlink(temporary.c_str());
    fd = -1;
  }
  [[noreturn]] void fail(int error) {
    discard();
    die("cannot write %s: %s", path.c_str(), write_error_text(error).c_str());
  }
  void write(const void* data, size_t bytes) {
    const char* p = (const char*)data;
    while (bytes > 0) {
      ssize_t n = ::write(fd, p, std::min(bytes, (size_t)1 << 30));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) fail(n < 0 ? errno : ENOSPC);
      p += n;                                          // a short write: the next one says why
      bytes -= (size_t)n;
    }
  }
  void commit() {
    if (fsync(fd)) fail(errno);                        // some file systems find out only here that the disk is full
    int error = close(fd) && errno != EINTR ? errno : 0;
    fd = -1;
    if (!error && rename(temporary.c_str(), path.c_str())) error = errno;
    if (error) unlink(temporary.c_str());
    else error = flush_path(parent_directory(path), true);
    if (error) die("cannot write %s: %s", path.c_str(), write_error_text(error).c_str());
  }
};

// ----------------------------------------------------------------------------------------------------------------------------
// Writer: declare every tensor, then write the data in the same order.
//   SafetensorsWriter w(path);
//   w.declare("wte.weight", "F32", {V, C});  w.declare("h.0.ln_1.weight", "BF16", {C});
//   w.write_f32(wte, V * C);  w.write_f32(ln, C);    // converted to what was declared; any pieces within one tensor
//   w.finish();                                      // the file appears now

struct SafetensorsWriter {
  struct Tensor { std::string name, dtype; std::vector<int64_t> shape; size_t bytes; };
  AtomicFile file;
  std::vector<Tensor> tensors;
  std::map<std::string, std::string> metadata{{"format", "pt"}};   // transformers wants to see this
  size_t current = 0;          // the tensor being written
  size_t written = 0;          // bytes of it that are there
  bool started = false;

  explicit SafetensorsWriter(const std::string& path) : file(path) {}

  // A mistake of the program, not of its user; still one line, and no file.
  [[noreturn]] void misuse(const std::string& what) {
    file.discard();
    die("cannot write %s: %s", file.path.c_str(), what.c_str());
  }
  void declare(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape) {
    if (started) misuse("tensor '" + name + "' was declared after the first data");
    int64_t n = shape_elements(shape);
    int bits = dtype_bits(dtype);
    if (n < 0 || bits < 8) misuse("tensor '" + name + "' was declared as " + dtype + " " + shape_text(shape));
    for (const Tensor& t : tensors) if (t.name == name) misuse("tensor '" + name + "' was declared twice");
    tensors.push_back({name, dtype, shape, (size_t)n * (size_t)(bits / 8)});
  }

  void write_header() {
    started = true;
    JsonWriter w;
    w.indent = false;
    w.begin('{').key("__metadata__").begin('{');
    for (const auto& m : metadata) w.key(m.first).string(m.second);
    w.end();
    size_t at = 0;
    for (const Tensor& t : tensors) {
      w.key(t.name).begin('{').key("dtype").string(t.dtype).key("shape").begin('[');
      for (int64_t d : t.shape) w.integer(d);
      w.end().key("data_offsets").begin('[').integer((int64_t)at).integer((int64_t)(at + t.bytes)).end().end();
      at += t.bytes;
    }
    w.end();
    while (w.text.size() % 8) w.text += ' ';           // the data starts aligned
    uint64_t n = w.text.size();
    file.write(&n, 8);
    file.write(w.text.data(), w.text.size());
    skip_full();
  }
  void skip_full() {
    while (current < tensors.size() && written == tensors[current].bytes) { current++; written = 0; }
  }
  // The next bytes of the data, as they are to stand in the file.
  void write(const void* data, size_t bytes) {
    if (!started) write_header();
    const char* p = (const char*)data;
    while (bytes > 0) {
      if (current == tensors.size()) misuse("more data was written than declared");
      size_t n = std::min(bytes, tensors[current].bytes - written);
      file.write(p, n);
      p += n; bytes -= n; written += n;
      skip_full();
    }
  }
  // The next n elements, all of one tensor that was declared F32 or BF16.
  void write_f32(const float* data, size_t n) {
    if (!started) write_header();
    if (n == 0) return;
    if (current == tensors.size()) misuse("more data was written than declared");
    const Tensor& t = tensors[current];
    if (t.dtype != "F32" && t.dtype != "BF16") misuse("tensor '" + t.name + "' was declared " + t.dtype + ", but floats were written");
    if (n > (t.bytes - written) / (t.dtype == "F32" ? 4 : 2))
      misuse("tensor '" + t.name + "' got more data than its shape " + shape_text(t.shape) + " holds");
    if (t.dtype == "F32") { write(data, 4 * n); return; }
    uint16_t buf[1 << 14];
    for (size_t i = 0; i < n;) {
      size_t m = std::min(n - i, sizeof buf / 2);
      for (size_t j = 0; j < m; j++) buf[j] = float_to_bf16_bits(data[i + j]);
      write(buf, 2 * m);
      i += m;
    }
  }
  void finish() {
    if (!started) write_header();
    if (current < tensors.size())
      misuse("tensor '" + tensors[current].name + "' got " + std::to_string(written) + " of its " + std::to_string(tensors[current].bytes) + " bytes");
    file.commit();
  }
};
