// data/tokenize.cpp -- ./tokenize: text files to token files.
//
// A token file is llm.c's: int32[256] header {20240520, 1, number of tokens}, then the tokens as uint16, little-endian. Each document (a
// file, or what lies between separators) starts with the end-of-text token, if the tokenizer has one. Inputs are mapped and outputs
// streamed, so size does not matter. An output is written under a temporary name, flushed to disk and renamed: whatever happens, a
// file with the final name is complete.
#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>
#include "errors.h"      // defines: die, die_usage
#include "loader.h"      // defines: MappedFile, kTokenFileMagic
#include "tokenizer.h"   // defines: Tokenizer

static const char kHelp[] = R"(usage: tokenize [options] --out PREFIX FILES...

Turns text files into token files for train_fp4.

  --tokenizer X         bytes, or a rank file in tiktoken's format (default data/gpt2.tiktoken; data/gpt2_tokenizer.sh gets it)
  --out PREFIX          writes PREFIX.bin, or PREFIX_train.bin and PREFIX_val.bin with --val-fraction;
                        with --shard-tokens, _000001, _000002, ... stands before .bin
  --val-fraction F      the last part of the text, F of its bytes (cut at a line's end), goes to the validation file (default 0)
  --shard-tokens N      at most N tokens a file (default: no limit)
  --separator TEXT      TEXT stands between the documents of a file, and is left out (default: a file is one document)
  --help                this page

example: ./tokenize --out data/tinyshakespeare --val-fraction 0.1 data/tinyshakespeare.txt
)";

struct Options {
  std::string tokenizer = "data/gpt2.tiktoken", out, separator;
  double val_fraction = 0;
  int64_t shard_tokens = 0;
  std::vector<std::string> files;
};

constexpr int64_t kMostTokens = INT32_MAX;                       // what the header of one file can say

// ---------------------------------------------------------------------------------------------------------------------------------
// output

// Writes PREFIX.bin, or PREFIX_000001.bin, PREFIX_000002.bin, ... Nothing is created before the first token.
struct TokenWriter {
  std::string prefix;
  int64_t shard_tokens;                                          // 0: one file
  int64_t total = 0, in_file = 0;
  int files = 0;
  std::string path = {}, temporary = {};
  FILE* file = nullptr;

  std::string path_of(int number) const {
    char suffix[16] = "";
    if (shard_tokens) snprintf(suffix, sizeof suffix, "_%06d", number);
    return prefix + suffix + ".bin";
  }

  // Shards of an earlier run could mix with the new ones, so they are not overwritten.
  void refuse_old_shards() const {
    if (shard_tokens && access(path_of(1).c_str(), F_OK) == 0)
      die("%s is already there; remove the old shards or choose another --out", path_of(1).c_str());
  }

  void write(const std::vector<uint16_t>& tokens) {
    for (size_t at = 0; at < tokens.size(); ) {
      if (!file) start();
      const int64_t room = (shard_tokens ? shard_tokens : kMostTokens) - in_file, n = std::min<int64_t>(room, tokens.size() - at);
      if (n == 0) fail("more tokens than one file can hold: give --shard-tokens");
      must(fwrite(&tokens[at], sizeof(uint16_t), n, file) == (size_t)n);
      at += n;
      in_file += n;
      total += n;
      if (in_file == shard_tokens) finish();
    }
  }

  void finish() {
    if (!file) return;
    must(fseek(file, 0, SEEK_SET) == 0);
    write_header((int32_t)in_file);
    must(fflush(file) == 0 && fsync(fileno(file)) == 0);
    must(fclose(file) == 0 && rename(temporary.c_str(), path.c_str()) == 0);
    file = nullptr;
    sync_directory();
    printf("%s: %lld tokens\n", path.c_str(), (long long)in_file);
    fflush(stdout);
  }

 private:
  void start() {
    path = path_of(++files);
    temporary = path + ".tmp";
    in_file = 0;
    file = fopen(temporary.c_str(), "wb");
    if (!file) die("cannot write %s: %s", temporary.c_str(), strerror(errno));
    write_header(0);
  }
  void write_header(int32_t tokens) {
    const int32_t header[256] = {kTokenFileMagic, kTokenFileVersion, tokens};
    must(fwrite(header, sizeof header, 1, file) == 1);
  }
  void sync_directory() const {                                  // so that the new name, too, survives a power cut
    const size_t slash = path.rfind('/');
    const std::string directory = slash == path.npos ? "." : path.substr(0, slash + 1);
    const int fd = open(directory.c_str(), O_RDONLY);
    if (fd >= 0) { fsync(fd); close(fd); }                       // some file systems cannot: no harm done
  }
  void must(bool ok) const { if (!ok) fail(strerror(errno)); }
  [[noreturn]] void fail(const char* why) const {
    unlink(temporary.c_str());
    die("cannot write %s: %s", path.c_str(), why);
  }
};

// ---------------------------------------------------------------------------------------------------------------------------------
// from documents to tokens

struct Program {
  const Options& options;
  Tokenizer tokenizer;
  TokenWriter train, val;
  int64_t bytes_all = 0, bytes_done = 0;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now(), last_shown = start;

  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

  void show_progress() {
    const auto now = std::chrono::steady_clock::now();
    if (!isatty(2) || now - last_shown < std::chrono::seconds(1)) return;
    last_shown = now;
    fprintf(stderr, "%5.1f%%  %.1f MB/s \r", 100.0 * bytes_done / bytes_all, bytes_done / seconds() / 1e6);
  }

  void add_document(std::string_view text, TokenWriter& out) {
    constexpr size_t kBytesAtOnce = 1 << 20;
    if (text.empty()) return;
    std::vector<uint16_t> tokens;
    if (tokenizer.end_of_text() >= 0) tokens.push_back((uint16_t)tokenizer.end_of_text());
    while (!text.empty()) {
      const size_t n = tokenizer.encode_prefix(text, kBytesAtOnce, tokens);
      out.write(tokens);
      tokens.clear();
      text.remove_prefix(n);
      bytes_done += n;
      show_progress();
    }
  }

  // Bytes of this document, the first of which is number `offset` of all input, that belong to the training part.
  size_t training_bytes(std::string_view text, int64_t offset) const {
    const int64_t cut = bytes_all - (int64_t)std::llround(bytes_all * options.val_fraction) - offset;
    if (cut <= 0) return 0;
    if (cut >= (int64_t)text.size()) return text.size();
    const size_t newline = text.find('\n', cut - 1);
    if (newline != text.npos) return newline + 1;
    size_t at = cut;                                             // one endless line: at least cut no character in two
    while (at < text.size() && ((uint8_t)text[at] & 0xc0) == 0x80) at++;
    return at;
  }

  // offset: bytes in the files before this one.
  void add_file(std::string_view text, int64_t offset) {
    const std::string& separator = options.separator;
    for (size_t at = 0; at < text.size(); ) {
      const size_t stop = separator.empty() ? text.size() : std::min(text.find(separator, at), text.size());
      const std::string_view document = text.substr(at, stop - at);
      const size_t n = training_bytes(document, offset + at);
      add_document(document.substr(0, n), train);
      add_document(document.substr(n), val);
      bytes_done += std::min(separator.size(), text.size() - stop);
      at = stop + separator.size();
    }
  }
};

static void tokenize_files(const Options& o) {
  Tokenizer tokenizer = o.tokenizer == "bytes" ? Tokenizer::bytes() : Tokenizer::gpt2(o.tokenizer.c_str());
  std::vector<MappedFile> inputs;
  for (const std::string& path : o.files) inputs.emplace_back("input", path);

  const std::string prefix = o.val_fraction > 0 ? o.out + "_train" : o.out;
  Program p{o, std::move(tokenizer), TokenWriter{prefix, o.shard_tokens}, TokenWriter{o.out + "_val", o.shard_tokens}};
  for (const MappedFile& f : inputs) p.bytes_all += f.size;
  if (p.bytes_all == 0) die("the input files are empty");
  if (!o.shard_tokens && p.bytes_all + (int64_t)inputs.size() > kMostTokens)   // before hours of work; tokens may be fewer than bytes
    die("%.1f GB of text may be more tokens than one file can hold (2^31): give --shard-tokens, such as 100000000", p.bytes_all / 1e9);
  p.train.refuse_old_shards();
  if (o.val_fraction > 0) p.val.refuse_old_shards();

  int64_t offset = 0;
  for (const MappedFile& f : inputs) {
    if (f.size) p.add_file({(const char*)f.data, f.size}, offset);
    offset += f.size;
  }
  p.train.finish();
  if (o.val_fraction > 0 && p.val.total == 0) die("no text is left for validation: raise --val-fraction above %g", o.val_fraction);
  p.val.finish();
  const int64_t total = p.train.total + p.val.total;
  if (total == 0) die("the input files hold nothing but separators");
  printf("%lld bytes, %lld tokens (vocabulary %d), %.2f bytes a token, %.1f MB/s\n", (long long)p.bytes_all, (long long)total, p.tokenizer.vocab(),
         (double)p.bytes_all / total, p.bytes_all / p.seconds() / 1e6);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// the command line

static bool is_option(const std::string& name) {                 // all take a value
  for (const char* known : {"--tokenizer", "--out", "--val-fraction", "--shard-tokens", "--separator"}) if (name == known) return true;
  return false;
}

static void set_option(Options& o, const std::string& name, const std::string& value) {
  char* end = nullptr;
  if (name == "--tokenizer") o.tokenizer = value;
  if (name == "--out") o.out = value;
  if (name == "--separator") o.separator = value;
  if (name == "--val-fraction") {
    o.val_fraction = strtod(value.c_str(), &end);
    if (value.empty() || *end || !(o.val_fraction >= 0 && o.val_fraction < 1))
      die_usage("--val-fraction %s: a number of at least 0 and below 1 is needed", value.c_str());
  }
  if (name == "--shard-tokens") {
    o.shard_tokens = strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end || o.shard_tokens < 1 || o.shard_tokens > kMostTokens)
      die_usage("--shard-tokens %s: a whole number from 1 to %lld is needed", value.c_str(), (long long)kMostTokens);
  }
}

// --name value, --name=value; everything after -- is a file.
static Options parse_options(int argc, char** argv) {
  Options o;
  bool only_files = false;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    if (only_files || word[0] != '-') { o.files.push_back(word); continue; }
    if (word == "--") { only_files = true; continue; }
    if (word == "--help" || word == "-h") { fputs(kHelp, stdout); exit(0); }
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    if (!is_option(name)) die_usage("unknown option %s; tokenize --help lists them", argv[i]);
    if (equals != word.npos) set_option(o, name, word.substr(equals + 1));
    else if (i + 1 < argc) set_option(o, name, argv[++i]);
    else die_usage("%s needs a value; tokenize --help says which", name.c_str());
  }
  if (o.files.empty()) die_usage("no input file given; tokenize --help shows how");
  if (o.out.empty()) die_usage("--out PREFIX is needed; tokenize --help shows how");
  return o;
}

int main(int argc, char** argv) {
  tokenize_files(parse_options(argc, argv));
  return 0;
}
