// data/loader.h -- hands out batches of tokens from token files and text files.
//
// What a user may give to --train and --val: a file, a pattern ("data/fineweb_train_*.bin"), a directory, or several of these, separated
// by commas or spaces ("*.cu,kernels/*.cuh"). All files found, in sorted order, are one long stream of tokens; it does not matter where
// one ends and the next starts. Files are mapped into memory, so a set larger than memory works.
//   token file   int32[256] header {20240520, 1, number of tokens}, then the tokens as uint16, little-endian: llm.c's format, made by
//                ./tokenize or downloaded by data/fineweb.sh
//   text file    anything else: each byte is a token
// One text can serve both ends: its last val_fraction is validated on, the rest trained on.
//
// Sequence w is the window of T + 1 tokens that starts at token w * T: T inputs, and as targets the same shifted by one. The last token
// of a window is the first of the next, so every token but the first is predicted exactly once an epoch.
//
// The run's sequence number s is window shuffled_index(s % windows, windows, seed, s / windows): a permutation that is computed, not
// stored. Batches are thus a pure function of the seed and the number of sequences consumed so far; resuming needs only that number,
// and several processes can each load their own part of a batch.
#pragma once
#include <dirent.h>
#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>
#include "errors.h"   // defines: die

// ---------------------------------------------------------------------------------------------------------------------------------
// files

// A file's bytes, read-only. Must not be shortened while it is in use.
struct MappedFile {
  std::string path;
  const uint8_t* data = nullptr;                                 // null if the file is empty
  size_t size = 0;

  // option: what the error names beside the file, such as --train.
  MappedFile(const char* option, const std::string& file_path) : path(file_path) {
    const int fd = open(path.c_str(), O_RDONLY);
    struct stat info;
    if (fd < 0 || fstat(fd, &info)) die("%s: cannot open %s: %s", option, path.c_str(), strerror(errno));
    if (!S_ISREG(info.st_mode)) die("%s: %s is not a regular file; files are mapped into memory, which pipes cannot be", option, path.c_str());
    size = info.st_size;
    void* address = size ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0) : nullptr;
    if (address == MAP_FAILED) die("%s: cannot map %s into memory: %s", option, path.c_str(), strerror(errno));
    data = (const uint8_t*)address;
    close(fd);
  }
  ~MappedFile() { if (data) munmap((void*)data, size); }
  MappedFile(MappedFile&& other) noexcept : path(std::move(other.path)), data(std::exchange(other.data, nullptr)), size(other.size) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path, other.path); std::swap(data, other.data); std::swap(size, other.size);
    return *this;
  }
};

inline bool is_directory(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

inline bool ends_with(const std::string& text, const char* end) {
  const size_t n = strlen(end);
  return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

// The text files directly inside a directory: all but hidden ones. Token files there are most likely a training and a validation set.
inline std::vector<std::string> files_in_directory(const char* option, const std::string& path) {
  DIR* directory = opendir(path.c_str());
  if (!directory) die("%s: cannot open directory %s: %s", option, path.c_str(), strerror(errno));
  std::vector<std::string> files;
  while (const dirent* entry = readdir(directory)) {
    const std::string file = path + (path.back() == '/' ? "" : "/") + entry->d_name;
    if (entry->d_name[0] == '.' || is_directory(file)) continue;
    if (ends_with(file, ".bin")) die("%s: directory %s holds token files (%s): choose with a pattern, such as '%s/*train*.bin'",
                                     option, path.c_str(), entry->d_name, path.c_str());
    files.push_back(file);
  }
  closedir(directory);
  if (files.empty()) die("%s: directory %s holds no files", option, path.c_str());
  return files;
}

// The files that match a pattern, without directories.
inline std::vector<std::string> files_matching(const std::string& pattern) {
  std::vector<std::string> files;
  glob_t found;
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0)
    for (size_t i = 0; i < found.gl_pathc; i++)
      if (!is_directory(found.gl_pathv[i])) files.push_back(found.gl_pathv[i]);
  globfree(&found);
  return files;
}

// The files of one name: a file, a directory or a pattern. None if there is no such file.
inline std::vector<std::string> files_named(const char* option, const std::string& name) {
  if (is_directory(name)) return files_in_directory(option, name);
  if (access(name.c_str(), F_OK) == 0) return {name};
  return files_matching(name);
}

// All files that `what` names, sorted by the bytes of their paths, each once. A name with spaces or commas in it may stand alone.
inline std::vector<std::string> find_data_files(const char* option, const std::string& what) {
  std::vector<std::string> files = files_named(option, what);
  if (files.empty()) {                                           // then it is a list
    size_t start = what.find_first_not_of(", ");
    if (start == what.npos) die("%s: no file given", option);
    while (start != what.npos) {
      const size_t stop = std::min(what.find_first_of(", ", start), what.size());
      const std::string name = what.substr(start, stop - start);
      const std::vector<std::string> more = files_named(option, name);
      if (more.empty() && name.find_first_of("*?[") != name.npos) die("%s: nothing matches '%s'", option, name.c_str());
      if (more.empty())
        die("%s: cannot open %s: %s; data/tinyshakespeare.sh and data/fineweb.sh download text", option, name.c_str(), strerror(ENOENT));
      files.insert(files.end(), more.begin(), more.end());
      start = what.find_first_not_of(", ", stop);
    }
  }
  std::sort(files.begin(), files.end());
  files.erase(std::unique(files.begin(), files.end()), files.end());
  return files;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// token files

constexpr int32_t kTokenFileMagic = 20240520, kTokenFileVersion = 1;
constexpr int32_t kLlama3FileMagic = 20240801;                   // llm.c's tokens of 32 bits
constexpr size_t kTokenFileHeader = 256 * sizeof(int32_t);

// A file as a part of the stream.
struct Shard {
  MappedFile file;
  const uint16_t* tokens;                                        // null: a text, whose tokens are its bytes
  int64_t count;                                                 // tokens in this file
  int64_t start;                                                 // position of the first one in the stream

  int token(int64_t i) const { return tokens ? tokens[i] : file.data[i]; }
};

inline bool has_token_file_magic(const MappedFile& file) {
  return file.size >= sizeof kTokenFileMagic && memcmp(file.data, &kTokenFileMagic, sizeof kTokenFileMagic) == 0;
}

// Looks at the header, and dies unless it fits the file.
inline Shard open_shard(const char* option, const std::string& path, int64_t start) {
  MappedFile file(option, path);
  int32_t header[3] = {0, 0, 0};
  if (file.size) memcpy(header, file.data, std::min(file.size, sizeof header));
  if (!has_token_file_magic(file)) {
    if (file.size == 0 && ends_with(path, ".bin")) die("%s: %s is empty; download or make it again", option, path.c_str());
    if (header[0] == kLlama3FileMagic) die("%s: %s holds tokens of 32 bits (Llama 3); only 16 bits are read here", option, path.c_str());
    if (ends_with(path, ".bin"))
      die("%s: %s is no token file: it starts with %d, not %d; ./tokenize makes them from text", option, path.c_str(), header[0], kTokenFileMagic);
    const int64_t bytes = file.size;
    return {std::move(file), nullptr, bytes, start};
  }
  if (file.size < kTokenFileHeader)
    die("%s: %s is truncated: %zu bytes, but the header alone takes %zu", option, path.c_str(), file.size, kTokenFileHeader);
  if (header[1] != kTokenFileVersion) die("%s: %s has version %d; only version %d is read here", option, path.c_str(), header[1], kTokenFileVersion);
  const int64_t promised = header[2], held = (file.size - kTokenFileHeader) / 2;
  if (promised < 0) die("%s: %s is damaged: its header says %lld tokens", option, path.c_str(), (long long)promised);
  if (promised > held)
    die("%s: %s is truncated: its header says %lld tokens, but it holds %lld; download or make it again", option, path.c_str(),
        (long long)promised, (long long)held);
  if (file.size % 2)
    die("%s: %s has an odd size, %zu bytes, but a token takes two; download or make it again", option, path.c_str(), file.size);
  if (promised < held)
    die("%s: %s holds %lld tokens, but its header says only %lld (token files cannot be joined with cat: give a list)", option, path.c_str(),
        (long long)held, (long long)promised);
  const uint16_t* tokens = (const uint16_t*)(file.data + kTokenFileHeader);
  return {std::move(file), tokens, promised, start};
}

// ---------------------------------------------------------------------------------------------------------------------------------
// shuffling

// The finalizer of splitmix64 (Steele, Lea and Flood 2014): every bit of x matters to every bit of the result.
inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Where a permutation of 0 ... n-1, chosen by seed and epoch, takes index. A Feistel network permutes the numbers of 2h bits, the
// fewest that hold n; a result of n or more is sent through again until one is smaller ("cycle walking": on average at most 4 times,
// for small n 256 / n times). At least 8 bits, for smaller networks are not random enough: with 4, neighbours among 10 windows stayed
// neighbours 1 % too often over 2 million epochs; with 8, no deviation was seen for n = 5, 10, 64, 250 over 1 million.
inline int64_t shuffled_index(int64_t index, int64_t n, uint64_t seed, uint64_t epoch) {
  constexpr int kRounds = 8;
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ull;            // 2^64 / golden ratio: splitmix64's step
  int h = 4;
  while (h < 31 && (1ull << 2 * h) < (uint64_t)n) h++;
  const uint64_t low_bits = (1ull << h) - 1, key = mix64(mix64(seed + kGolden) + (epoch + 1) * kGolden);
  uint64_t x = index;
  do {
    uint64_t left = x >> h, right = x & low_bits;
    for (uint64_t round = 0; round < kRounds; round++) {
      const uint64_t random = mix64(key + (right * kRounds + round + 1) * kGolden);
      right = std::exchange(left, right) ^ (random & low_bits);
    }
    x = left << h | right;
  } while (x >= (uint64_t)n);
  return x;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// the loader

enum class DataPart { all, train, val };                         // val: the last val_fraction of the stream; train: the rest

struct DataOptions {
  int seq_len = 1024;                                            // T
  DataPart part = DataPart::all;
  double val_fraction = 0;                                       // below 1
  int vocab = 0;                                                 // the model's; tokens must be below it. 0: not checked
  uint64_t seed = 0;                                             // of the shuffle
  const char* option = "--train";                                // named in errors
};

struct DataLoader {
  // Finds, maps and checks the files. Dies, naming the file, if one is missing or damaged, a token is outside the vocabulary, or there
  // is not a single sequence.
  DataLoader(const std::string& files, const DataOptions& options);

  // Number of whole sequences: an epoch. At least 1.
  int64_t windows() const { return (tokens() - 1) / T; }
  // The same with the last one, if it is shorter.
  int64_t windows_and_tail() const { return (tokens() - 1 + T - 1) / T; }
  int64_t tokens() const { return end - begin; }
  bool is_text() const { return !shards[0].tokens; }

  // Sequences first, first + 1, ... first + B - 1 of the run, in the shuffled order; inputs and targets: [B, T]. Batch number n of a
  // run starts at first = n * B. A new epoch, shuffled anew, starts every windows() sequences.
  void load_shuffled(int64_t first, int B, int* inputs, int* targets) const;

  // Windows first ... first + B - 1 in the order of the file. Where the data ends inside a window, and in windows after the last one,
  // inputs are 0 and targets -1. Windows 0 ... windows_and_tail() - 1 predict every token but the first once.
  void load_in_order(int64_t first, int B, int* inputs, int* targets) const;

  std::vector<Shard> shards;
  int64_t begin = 0, end = 0;                                    // this loader's part of the stream
  int T, vocab;
  uint64_t seed;
  const char* option;

 private:
  void choose_part(const DataOptions& options);
  void check_vocabulary() const;
  void check_range(const Shard& shard, int64_t from, int64_t to) const;
  [[noreturn]] void die_outside_vocabulary(const Shard& shard, int64_t position) const;
  void read(int64_t position, int64_t count, int* out) const;
  void load_window(int64_t window, int* inputs, int* targets) const;
};

inline DataLoader::DataLoader(const std::string& files, const DataOptions& options)
    : T(options.seq_len), vocab(options.vocab), seed(options.seed), option(options.option) {
  if (T < 1) die("%s: a sequence of %d tokens: --seq must be at least 1", option, T);
  if (!(options.val_fraction >= 0 && options.val_fraction < 1)) die("--val-fraction %g: must be at least 0 and below 1", options.val_fraction);
  for (const std::string& path : find_data_files(option, files)) {
    shards.push_back(open_shard(option, path, end));
    end += shards.back().count;
    const Shard &first = shards[0], &last = shards.back();
    if (!first.tokens != !last.tokens)
      die("%s: %s holds tokens, but %s is text: give the one kind or the other", option, (first.tokens ? first : last).file.path.c_str(),
          (first.tokens ? last : first).file.path.c_str());
  }
  choose_part(options);
  check_vocabulary();
}

inline void DataLoader::choose_part(const DataOptions& options) {
  const int64_t cut = end - (int64_t)std::llround(end * options.val_fraction);
  if (options.part == DataPart::train) end = cut;
  if (options.part == DataPart::val) begin = cut;
  if (tokens() > T) return;
  const std::string more = shards.size() > 1 ? " and " + std::to_string(shards.size() - 1) + " more" : "";
  const bool train = options.part == DataPart::train && options.val_fraction > 0, val = options.part == DataPart::val;
  const char* part = train ? "the training part of " : val ? "the validation part of " : "";
  const char* what_to_do = train ? "lower --seq or --val-fraction" : val ? "lower --seq or raise --val-fraction" : "lower --seq or give more data";
  die("%s: only %lld tokens in %s%s%s, but one sequence takes %d (--seq %d and one more): %s", option, (long long)tokens(), part,
      shards[0].file.path.c_str(), more.c_str(), T + 1, T, what_to_do);
}

// Before training rather than days into it. Reading the whole of a very large set would delay the start by minutes: there both ends of
// each file are looked at here (a set made with another tokenizer shows in the first thousand tokens), the rest when it is loaded.
inline void DataLoader::check_vocabulary() const {
  constexpr int64_t kReadAll = 1 << 30, kReadEnd = 1 << 20;
  if (vocab <= 0 || vocab > (is_text() ? UINT8_MAX : UINT16_MAX)) return;
  const bool all = shards.back().start + shards.back().count <= kReadAll;
  for (const Shard& s : shards) {
    check_range(s, 0, all ? s.count : std::min(s.count, kReadEnd));
    if (!all) check_range(s, std::max<int64_t>(0, s.count - kReadEnd), s.count);
  }
}

inline void DataLoader::check_range(const Shard& shard, int64_t from, int64_t to) const {
  int largest = 0;
  if (shard.tokens) for (int64_t i = from; i < to; i++) largest = std::max<int>(largest, shard.tokens[i]);
  else              for (int64_t i = from; i < to; i++) largest = std::max<int>(largest, shard.file.data[i]);
  if (largest < vocab) return;
  while (shard.token(from) < vocab) from++;
  die_outside_vocabulary(shard, from);
}

inline void DataLoader::die_outside_vocabulary(const Shard& shard, int64_t position) const {
  die("%s: %s, position %lld: token %d, but the model's vocabulary ends at %d: "
      "choose a model with a larger vocabulary or make the tokens with its tokenizer",
      option, shard.file.path.c_str(), (long long)position, shard.token(position), vocab - 1);
}

// Tokens [position, position + count) of this part, which must lie inside it.
inline void DataLoader::read(int64_t position, int64_t count, int* out) const {
  position += begin;
  auto shard = std::upper_bound(shards.begin(), shards.end(), position, [](int64_t p, const Shard& s) { return p < s.start; }) - 1;
  while (count > 0) {
    const int64_t at = position - shard->start, n = std::min(count, shard->count - at);
    for (int64_t i = 0; i < n; i++) {
      out[i] = shard->token(at + i);
      if (vocab > 0 && out[i] >= vocab) die_outside_vocabulary(*shard, at + i);
    }
    out += n;
    position += n;
    count -= n;
    ++shard;
  }
}

inline void DataLoader::load_window(int64_t window, int* inputs, int* targets) const {
  const int64_t from = std::min(window, windows_and_tail()) * T;
  const int n = (int)std::clamp<int64_t>(tokens() - 1 - from, 0, T);
  std::fill(inputs + n, inputs + T, 0);
  std::fill(targets + n, targets + T, -1);
  if (n == 0) return;
  read(from, n, inputs);
  std::copy(inputs + 1, inputs + n, targets);
  read(from + n, 1, targets + n - 1);
}

inline void DataLoader::load_shuffled(int64_t first, int B, int* inputs, int* targets) const {
  const int64_t n = windows();
  for (int b = 0; b < B; b++) {
    const int64_t s = first + b;
    load_window(shuffled_index(s % n, n, seed, s / n), inputs + (int64_t)b * T, targets + (int64_t)b * T);
  }
}

inline void DataLoader::load_in_order(int64_t first, int B, int* inputs, int* targets) const {
  for (int b = 0; b < B; b++) load_window(first + b, inputs + (int64_t)b * T, targets + (int64_t)b * T);
}
