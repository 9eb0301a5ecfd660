// data/checkpoint.h -- model directories in the layout of Hugging Face, and how they get to the disk whole.
//
// A model directory holds config.json and model.safetensors: `transformers` loads what we write, and GPT-2 and Llama directories
// load here. A checkpoint of a run is a model directory plus trainer_state.safetensors (optimizer, position in the data, ...):
//   RUN/step_000500/{config.json, model.safetensors, trainer_state.safetensors}
// Each is written under a hidden temporary name and renamed when everything is flushed, so that a name without the dot in front
// always stands for a whole checkpoint, whenever the program or the machine stops.
#pragma once
#include <dirent.h>
#include "safetensors.h"

// ----------------------------------------------------------------------------------------------------------------------------
// The shape of a model, and config.json

struct ModelConfig {
  bool llama = false;      // false: GPT-2
  int layers = 0;
  int channels = 0;
  int heads = 0;
  int kv_heads = 0;        // = heads for GPT-2
  int head_dim = 0;        // GPT-2: channels / heads
  int ffn = 0;             // width inside the MLP
  int vocab = 0;
  int max_seq = 0;
  float norm_eps = 1e-5f;
  float rope_theta = 0;    // Llama only
  bool tied = true;        // lm_head is the token embedding
  int bos = -1, eos = -1;  // token ids, -1: none. Only carried along for programs that generate text
};

// What the model code cannot do, as a sentence; empty if all is well. Also for models that come from the command line.
inline std::string config_problem(const ModelConfig& c) {
  struct { const char* name; int value, most; } sizes[] = {
    {"layers", c.layers, 10000}, {"channels", c.channels, 1 << 20}, {"heads", c.heads, 1 << 16}, {"key/value heads", c.kv_heads, 1 << 16},
    {"channels a head", c.head_dim, 1 << 16}, {"MLP width", c.ffn, 1 << 24}, {"vocabulary", c.vocab, 1 << 24}, {"longest sequence", c.max_seq, 1 << 24}};
  for (auto& s : sizes)
    if (s.value < 1 || s.value > s.most) return std::string(s.name) + " is " + std::to_string(s.value) + "; it must be 1 to " + std::to_string(s.most);
  if (c.heads % c.kv_heads) return std::to_string(c.heads) + " heads cannot share " + std::to_string(c.kv_heads) + " key/value heads evenly";
  if (!c.llama && c.heads * (int64_t)c.head_dim != c.channels)
    return std::to_string(c.channels) + " channels do not divide into " + std::to_string(c.heads) + " heads";
  if (c.head_dim % 2 || c.head_dim < 8 || c.head_dim > 128)
    return "a head has " + std::to_string(c.head_dim) + " channels; attention here takes even numbers from 8 to 128";
  if (!(c.norm_eps > 0 && c.norm_eps < 1)) return "the epsilon of the norms must be between 0 and 1";
  if (c.llama && !(c.rope_theta > 0 && std::isfinite(c.rope_theta))) return "rope_theta must be positive";
  return "";
}

// Reads single keys of one config.json and dies with file and key where they do not fit.
struct ConfigReader {
  std::string file;
  const Json& json;

  const Json* find(const char* key, Json::Kind kind) const {   // absent and null are the same: the default
    const Json* v = json.find(key);
    if (!v || v->is_null()) return nullptr;
    if (v->kind != kind) die("%s: '%s' is %s, expected %s", file.c_str(), key, json_kind_name(v->kind), json_kind_name(kind));
    return v;
  }
  int integer(const char* key, int otherwise) const {
    const Json* v = find(key, Json::kNumber);
    if (!v) return otherwise;
    if (!v->is_integer || v->integer < INT32_MIN || v->integer > INT32_MAX) die("%s: '%s' is not a whole number of 32 bits", file.c_str(), key);
    return (int)v->integer;
  }
  int integer(const char* key) const {
    if (!find(key, Json::kNumber)) die("%s has no '%s'", file.c_str(), key);
    return integer(key, 0);
  }
  float number(const char* key, float otherwise) const { const Json* v = find(key, Json::kNumber); return v ? (float)v->number : otherwise; }
  bool boolean(const char* key, bool otherwise) const { const Json* v = find(key, Json::kBool); return v ? v->boolean : otherwise; }
  std::string string(const char* key, const char* otherwise) const { const Json* v = find(key, Json::kString); return v ? v->string : otherwise; }
  int token(const char* key) const {   // an id, or a list of ids of which the first is taken
    const Json* v = json.find(key);
    if (v && v->kind == Json::kArray && !v->items.empty()) v = &v->items[0];
    return v && v->is_integer && v->integer >= 0 && v->integer <= INT32_MAX ? (int)v->integer : -1;
  }
  // For what changes the numbers and is not implemented here: it must have the one value that is.
  void only_boolean(const char* key, bool value) const {
    if (boolean(key, value) != value) die("%s: '%s' is %s, which this trainer does not implement", file.c_str(), key, value ? "false" : "true");
  }
  void only_string(const char* key, const char* value, const char* same = nullptr) const {
    std::string s = string(key, value);
    if (s != value && !(same && s == same)) die("%s: '%s' is '%s'; this trainer implements only '%s'", file.c_str(), key, s.c_str(), value);
  }
  void only_absent(const char* key) const {
    const Json* v = json.find(key);
    if (v && !v->is_null()) die("%s: '%s' is set, which this trainer does not implement", file.c_str(), key);
  }
};

inline void read_config_gpt2(const ConfigReader& in, ModelConfig* c) {
  in.only_string("activation_function", "gelu_new", "gelu_pytorch_tanh");   // two names of the tanh form
  in.only_boolean("scale_attn_weights", true);
  in.only_boolean("scale_attn_by_inverse_layer_idx", false);
  in.only_boolean("add_cross_attention", false);
  c->layers = in.integer("n_layer");
  c->channels = in.integer("n_embd");
  c->heads = c->kv_heads = in.integer("n_head");
  c->head_dim = c->heads > 0 ? c->channels / c->heads : 0;
  c->ffn = in.integer("n_inner", c->channels < 1 << 24 ? 4 * c->channels : 0);
  c->vocab = in.integer("vocab_size");
  c->max_seq = in.integer("n_positions");
  c->norm_eps = in.number("layer_norm_epsilon", 1e-5f);
  c->tied = in.boolean("tie_word_embeddings", true);
}
// transformers 4 wrote "rope_theta" and "rope_scaling"; 5 writes "rope_parameters": {"rope_type": "default", "rope_theta": ...}.
inline void read_config_rope(const ConfigReader& in, ModelConfig* c) {
  c->rope_theta = in.number("rope_theta", 10000);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* v = in.find(key, Json::kObject);
    if (!v) continue;
    ConfigReader rope{in.file, *v};
    std::string type = rope.string("rope_type", rope.string("type", "default").c_str());
    if (type != "default") die("%s: '%s' asks for '%s' position embeddings; this trainer implements only 'default'", in.file.c_str(), key, type.c_str());
    if (rope.number("partial_rotary_factor", 1) != 1)
      die("%s: '%s' has a partial_rotary_factor, which this trainer does not implement", in.file.c_str(), key);
    c->rope_theta = rope.number("rope_theta", c->rope_theta);
  }
}
inline void read_config_llama(const ConfigReader& in, ModelConfig* c) {
  in.only_string("hidden_act", "silu", "swish");
  in.only_boolean("attention_bias", false);
  in.only_boolean("mlp_bias", false);
  read_config_rope(in, c);
  c->layers = in.integer("num_hidden_layers");
  c->channels = in.integer("hidden_size");
  c->heads = in.integer("num_attention_heads");
  c->kv_heads = in.integer("num_key_value_heads", c->heads);
  c->head_dim = in.integer("head_dim", c->heads > 0 ? c->channels / c->heads : 0);
  c->ffn = in.integer("intermediate_size");
  c->vocab = in.integer("vocab_size");
  c->max_seq = in.integer("max_position_embeddings");
  c->norm_eps = in.number("rms_norm_eps", 1e-6f);
  c->tied = in.boolean("tie_word_embeddings", false);
}
// config.json of a model directory. Dies, naming file and key, if the model is not one that this trainer computes exactly.
inline ModelConfig read_config(const std::string& directory) {
  std::string file = directory + "/config.json";
  Json json = json_read_file(file);
  if (json.kind != Json::kObject) die("%s is not a JSON object", file.c_str());
  ConfigReader in{file, json};
  ModelConfig c;
  std::string type = in.string("model_type", "");
  in.only_absent("quantization_config");
  if (type == "gpt2") read_config_gpt2(in, &c);
  else if (type == "llama") { c.llama = true; read_config_llama(in, &c); }
  else die("%s: model_type is '%s'; this trainer knows gpt2 and llama", file.c_str(), type.c_str());
  c.bos = in.token("bos_token_id");
  c.eos = in.token("eos_token_id");
  std::string problem = config_problem(c);
  if (!problem.empty()) die("%s: %s", file.c_str(), problem.c_str());
  return c;
}

// The text of a config.json that transformers 4 and 5 load. dtype: "float32" or "bfloat16", as the weights are stored.
inline std::string config_text(const ModelConfig& c, const char* dtype = "float32") {
  JsonWriter w;
  auto token = [&](const char* key, int id) { w.key(key); if (id >= 0) w.integer(id); else w.null(); };
  w.begin('{').key("architectures").begin('[').string(c.llama ? "LlamaForCausalLM" : "GPT2LMHeadModel").end();
  w.key("model_type").string(c.llama ? "llama" : "gpt2");
  if (c.llama) {
    w.key("num_hidden_layers").integer(c.layers).key("hidden_size").integer(c.channels).key("num_attention_heads").integer(c.heads);
    w.key("num_key_value_heads").integer(c.kv_heads).key("head_dim").integer(c.head_dim).key("intermediate_size").integer(c.ffn);
    w.key("max_position_embeddings").integer(c.max_seq).key("rms_norm_eps").number(c.norm_eps).key("hidden_act").string("silu");
    w.key("rope_theta").number(c.rope_theta).key("rope_scaling").null();
    w.key("rope_parameters").begin('{').key("rope_type").string("default").key("rope_theta").number(c.rope_theta).end();
    w.key("attention_bias").boolean(false).key("mlp_bias").boolean(false).key("attention_dropout").integer(0);
  } else {
    w.key("n_layer").integer(c.layers).key("n_embd").integer(c.channels).key("n_head").integer(c.heads).key("n_inner").integer(c.ffn);
    w.key("n_positions").integer(c.max_seq).key("n_ctx").integer(c.max_seq).key("layer_norm_epsilon").number(c.norm_eps);
    w.key("activation_function").string("gelu_new").key("scale_attn_weights").boolean(true);
    w.key("attn_pdrop").integer(0).key("embd_pdrop").integer(0).key("resid_pdrop").integer(0);
  }
  w.key("vocab_size").integer(c.vocab).key("tie_word_embeddings").boolean(c.tied).key("initializer_range").number(0.02);
  token("bos_token_id", c.bos);
  token("eos_token_id", c.eos);
  w.key("torch_dtype").string(dtype).key("dtype").string(dtype).key("use_cache").boolean(true).end();   // the first name is the older one
  return w.text + "\n";
}

// GPT2LMHeadModel saves "transformer.wte.weight", ...; the files of the original release have bare names "wte.weight", ....
// Returns what stands in front in this file.
inline std::string gpt2_prefix(const SafetensorsReader& in) { return !in.has("transformer.wte.weight") && in.has("wte.weight") ? "" : "transformer."; }

// ----------------------------------------------------------------------------------------------------------------------------
// Small files

// Replaces a file by this text: afterwards, and after a crash at any moment, it is the old or the new one, never half of it.
inline void write_file_atomic(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}
inline void write_config(const std::string& directory, const ModelConfig& c, const char* dtype = "float32") {
  write_file_atomic(directory + "/config.json", config_text(c, dtype));
}
// mkdir -p
inline void make_directories(const std::string& path) {
  struct stat st;
  if (stat(path.c_str(), &st) == 0) {
    if (!S_ISDIR(st.st_mode)) die("%s exists and is not a directory", path.c_str());
    return;
  }
  if (parent_directory(path) != path && path != ".") make_directories(parent_directory(path));
  if (mkdir(path.c_str(), 0777) && errno != EEXIST) die("cannot make the directory %s: %s", path.c_str(), write_error_text(errno).c_str());
}
// Names in a directory without "." and "..", sorted. False if it cannot be read.
inline bool list_directory(const std::string& path, std::vector<std::string>* names) {
  names->clear();
  DIR* dir = opendir(path.c_str());
  if (!dir) return false;
  while (dirent* entry = readdir(dir)) {
    std::string name = entry->d_name;
    if (name != "." && name != "..") names->push_back(name);
  }
  closedir(dir);
  std::sort(names->begin(), names->end());
  return true;
}

// ----------------------------------------------------------------------------------------------------------------------------
// Removing: only what this program wrote. A checkpoint directory into which somebody put anything else is never deleted.

constexpr const char* kCheckpointFiles[] = {"config.json", "generation_config.json", "model.safetensors", "trainer_state.safetensors"};

inline bool starts_with(const std::string& s, const std::string& prefix) { return s.compare(0, prefix.size(), prefix) == 0; }
inline bool is_checkpoint_file(const std::string& name) {
  for (const char* known : kCheckpointFiles) if (name == known) return true;
  return starts_with(name, kTemporaryPrefix);
}
// Deletes a directory if it holds nothing but files of a checkpoint. Otherwise touches nothing and returns false.
inline bool remove_checkpoint(const std::string& directory) {
  std::vector<std::string> names;
  struct stat st;
  if (lstat(directory.c_str(), &st) || !S_ISDIR(st.st_mode) || !list_directory(directory, &names)) return false;
  for (const std::string& name : names)
    if (!is_checkpoint_file(name) || lstat((directory + "/" + name).c_str(), &st) || !S_ISREG(st.st_mode)) return false;
  for (const std::string& name : names) unlink((directory + "/" + name).c_str());
  return rmdir(directory.c_str()) == 0;
}
// A directory under one of our hidden names that is not needed any more: deleted, or, if it holds something of a user's, given
// the visible name NAME.kept-N beside it.
inline void retire_directory(const std::string& hidden, const std::string& visible) {
  if (remove_checkpoint(hidden)) return;
  struct stat st;
  std::string kept;
  for (int n = 1; kept.empty() || lstat(kept.c_str(), &st) == 0; n++) kept = visible + ".kept-" + std::to_string(n);
  if (rename(hidden.c_str(), kept.c_str()) == 0)
    fprintf(stderr, "note: the former %s holds files that are no part of a checkpoint; it is now %s\n", visible.c_str(), kept.c_str());
}

// ----------------------------------------------------------------------------------------------------------------------------
// A directory that appears whole or not at all.
//
//   AtomicDirectory dir(run + "/step_000500");
//   write_config(dir.path(), config); SafetensorsWriter w(dir.path() + "/model.safetensors"); ... w.finish(); ...
//   dir.commit();
//
// If the final name is taken, new and old change places in one system call (renameat2 with RENAME_EXCHANGE), so that the name
// stands for a whole checkpoint at every moment; then the old one is deleted. Where the file system cannot do that (some network
// ones), the old one first moves to a hidden name, from which clean_stale() brings it back should the program die just there.

struct AtomicDirectory {
  std::string final_path, temporary;
  int lock = -1;
  bool can_exchange = true;    // false: behave as on a file system without RENAME_EXCHANGE (for the tests)

  // Makes parents as needed. Dies if the directory cannot be made or the final name is a file.
  explicit AtomicDirectory(std::string path) {
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    struct stat st;
    if (stat(path.c_str(), &st) == 0) {
      if (!S_ISDIR(st.st_mode)) die("cannot write the directory %s: a file has that name", path.c_str());
      char* real = realpath(path.c_str(), nullptr);     // through symbolic links, and "." and ".." get their names
      if (real) path = real;
      free(real);
    }
    std::string name = base_name(path);
    if (name.empty() || name == "." || name == "..") die("cannot write a checkpoint to %s: it needs a name", path.c_str());
    final_path = path;
    make_directories(parent_directory(path));
    for (int n = 0;; n++) {
      temporary = hidden_sibling(path, kTemporaryPrefix, n);
      if (mkdir(temporary.c_str(), 0777) == 0) break;
      if (errno != EEXIST || n == 10000) die("cannot make the directory %s: %s", path.c_str(), write_error_text(errno).c_str());
    }
    lock = open(temporary.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock >= 0) (void)flock(lock, LOCK_EX | LOCK_NB);
  }
  ~AtomicDirectory() {
    if (!temporary.empty()) remove_checkpoint(temporary);
    if (lock >= 0) close(lock);
  }
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;

  const std::string& path() const { return temporary; }   // where the files go until commit()

  [[noreturn]] void fail(int error) {
    remove_checkpoint(temporary);
    die("cannot write the directory %s: %s", final_path.c_str(), write_error_text(error).c_str());
  }
  void commit() {
    std::vector<std::string> names;
    if (!list_directory(temporary, &names)) fail(errno);
    for (const std::string& name : names) if (int error = flush_path(temporary + "/" + name, false)) fail(error);
    if (int error = flush_path(temporary, true)) fail(error);
    std::string old = put_in_place();
    if (int error = flush_path(parent_directory(final_path), true))
      die("cannot write the directory %s: %s", final_path.c_str(), write_error_text(error).c_str());
    if (!old.empty()) retire_directory(old, final_path);
    temporary.clear();
  }
  // The rename. Returns where the replaced directory is now; empty if there was none.
  std::string put_in_place() {
    struct stat st;
    if (lstat(final_path.c_str(), &st)) {
      if (rename(temporary.c_str(), final_path.c_str())) fail(errno);
      return "";
    }
#ifdef RENAME_EXCHANGE
    if (can_exchange) {
      if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, final_path.c_str(), RENAME_EXCHANGE) == 0) return temporary;
      if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP) fail(errno);
    }
#endif
    std::string old;
    for (int n = 0; old.empty() || lstat(old.c_str(), &st) == 0; n++) old = hidden_sibling(final_path, kReplacedPrefix, n);
    if (rename(final_path.c_str(), old.c_str())) fail(errno);
    if (rename(temporary.c_str(), final_path.c_str())) {
      int error = errno;
      (void)!rename(old.c_str(), final_path.c_str());
      fail(error);
    }
    return old;
  }
};

// ".train_fp4-tmp.12.step_000500" -> "step_000500" if it begins so and a number follows; else empty.
inline std::string hidden_name_of(const std::string& name, const std::string& prefix) {
  if (!starts_with(name, prefix)) return "";
  size_t i = prefix.size();
  while (i < name.size() && name[i] >= '0' && name[i] <= '9') i++;
  return i > prefix.size() && i + 1 < name.size() && name[i] == '.' ? name.substr(i + 1) : "";
}
// Cleans up after runs that were killed: call it for the run directory at start. Removes their temporary files and directories
// (unless a living process holds their lock), and finishes or undoes a replacement that was cut short. Looks at nothing else.
inline void clean_stale(const std::string& parent) {
  std::vector<std::string> names;
  if (!list_directory(parent, &names)) return;
  for (const std::string& name : names) {
    std::string path = parent + "/" + name, target = hidden_name_of(name, kTemporaryPrefix), replaced = hidden_name_of(name, kReplacedPrefix);
    struct stat st;
    if (!target.empty()) {
      int fd = open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
      if (fd < 0) continue;
      bool in_use = flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK;
      bool known = fstat(fd, &st) == 0;
      if (known && !in_use && S_ISREG(st.st_mode)) unlink(path.c_str());
      if (known && !in_use && S_ISDIR(st.st_mode)) retire_directory(path, parent + "/" + target);
      close(fd);
    } else if (!replaced.empty() && lstat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode)) {
      std::string home = parent + "/" + replaced;
      if (lstat(home.c_str(), &st) && errno == ENOENT) (void)!rename(path.c_str(), home.c_str());
      else retire_directory(path, home);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------------------
// The checkpoints of a run

inline std::string step_directory(const std::string& run_dir, int64_t step) {
  char name[32];
  snprintf(name, sizeof name, "/step_%06lld", (long long)step);
  return run_dir + name;
}
// "step_000500" -> 500; -1 if the name is not of that form.
inline int64_t step_of_name(const std::string& name) {
  if (!starts_with(name, "step_") || name.size() < 11 || name.size() > 20) return -1;
  for (size_t i = 5; i < name.size(); i++) if (name[i] < '0' || name[i] > '9') return -1;
  return strtoll(name.c_str() + 5, nullptr, 10);
}
// Why a directory cannot be resumed from; empty if it is complete: all three files are there and sound (headers and sizes).
inline std::string checkpoint_problem(const std::string& directory) {
  Json config;
  std::string problem;
  if (!json_parse_file(directory + "/config.json", &config, &problem)) return problem;
  for (const char* name : {"/model.safetensors", "/trainer_state.safetensors"}) {
    SafetensorsReader reader;
    problem = reader.open(directory + name);
    if (!problem.empty()) return problem;
  }
  return "";
}
// Paths of the complete step_NNNNNN directories of a run, newest first; others are passed over.
inline std::vector<std::string> find_checkpoints(const std::string& run_dir, size_t most = (size_t)-1) {
  std::vector<std::string> names, found;
  list_directory(run_dir, &names);
  names.erase(std::remove_if(names.begin(), names.end(), [](const std::string& n) { return step_of_name(n) < 0; }), names.end());
  std::sort(names.begin(), names.end(), [](const std::string& a, const std::string& b) { return step_of_name(a) > step_of_name(b); });
  for (const std::string& name : names)
    if (found.size() < most && checkpoint_problem(run_dir + "/" + name).empty()) found.push_back(run_dir + "/" + name);
  return found;
}
inline std::string find_newest_checkpoint(const std::string& run_dir) {   // empty if there is none
  std::vector<std::string> found = find_checkpoints(run_dir, 1);
  return found.empty() ? "" : found[0];
}
// Deletes all complete checkpoints but the newest `keep`; keep 0 keeps all. Each first gets a hidden name, so that a crash
// cannot leave half of one. One that holds files of a user's stays, and so does anything incomplete. Returns how many went.
inline int prune_checkpoints(const std::string& run_dir, int keep) {
  int removed = 0;
  if (keep <= 0) return removed;
  std::vector<std::string> found = find_checkpoints(run_dir);
  for (size_t i = (size_t)keep; i < found.size(); i++) {
    std::vector<std::string> names;
    struct stat st;
    list_directory(found[i], &names);
    if (lstat(found[i].c_str(), &st) || !S_ISDIR(st.st_mode)) continue;   // a symbolic link is a user's
    if (!std::all_of(names.begin(), names.end(), is_checkpoint_file)) continue;
    std::string hidden = hidden_sibling(found[i], kTemporaryPrefix, 0);
    if (rename(found[i].c_str(), hidden.c_str())) continue;
    retire_directory(hidden, found[i]);
    removed++;
  }
  return removed;
}
