#!/usr/bin/env python3
"""A Llama from llama2.c (its first .bin format, "v0") as a Hugging Face directory that train_fp4 and transformers load.

  llama2c_to_hf.py stories260K.bin OUT_DIR
  llama2c_to_hf.py --tokenizer tok512.bin --text story.txt --out-tokens story.bin     text -> tokens, llm.c's .bin format

The file: 7 int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative vocab_size says that the
classifier has its own weights), then FP32: token embedding; per kind, for all layers: attention norm, wq, wk, wv, wo, MLP norm,
w1, w2, w3; last norm; two tables of rotary angles that nobody reads any more; the classifier if it is separate.

Rotary embedding turns pairs of channels. llama2.c pairs the neighbours 2i and 2i+1 of a head, Hugging Face the halves i and
i + D/2: the rows of wq and wk change places, and every q.k stays the same. Python's standard library is enough.
"""
import argparse
import heapq
import json
import os
import shutil
import struct
import sys


def fail(message):
    sys.exit(f"error: {message}")


def read(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")


# ---------------------------------------------------------------------------------------------------------------------------
# Weights

def parse_model(path):
    """-> config (dict), tensors {HF name: (shape, bytes)}"""
    data = read(path)
    if data[:4] == b"24ka":
        fail(f"{path} is a later llama2.c format (v1 or v2); export it with --version 0")
    if len(data) < 28:
        fail(f"{path} is no llama2.c model: it has {len(data)} bytes, the header alone takes 28")
    dim, ffn, layers, heads, kv_heads, vocab, seq = struct.unpack("<7i", data[:28])
    tied, vocab = vocab > 0, abs(vocab)
    if not all(0 < x < 1 << 24 for x in (dim, ffn, layers, heads, kv_heads, vocab, seq)) or dim % heads or heads % kv_heads or dim // heads % 2:
        fail(f"{path} is no llama2.c model: its header says dim {dim}, hidden {ffn}, layers {layers}, heads {heads}, kv heads {kv_heads}, "
             f"vocabulary {vocab}, sequence {seq}")
    head = dim // heads
    kv = kv_heads * head
    position = 28

    def take(*shape):
        nonlocal position
        size = 4
        for n in shape:
            size *= n
        start, position = position, position + size
        if position > len(data):
            fail(f"{path} is truncated: it has {len(data)} bytes, byte {position} is needed")
        return shape, memoryview(data)[start:position]

    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    for kind, shape in (("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (kv, dim)), ("self_attn.v_proj", (kv, dim)),
                        ("self_attn.o_proj", (dim, dim)), ("post_attention_layernorm", (dim,)), ("mlp.gate_proj", (ffn, dim)),
                        ("mlp.down_proj", (dim, ffn)), ("mlp.up_proj", (ffn, dim))):
        for layer in range(layers):
            tensors[f"model.layers.{layer}.{kind}.weight"] = take(*shape)
    tensors["model.norm.weight"] = take(dim)
    take(seq, head)                                            # cosines and sines, seq x head / 2 each
    if not tied:
        tensors["lm_head.weight"] = take(vocab, dim)
    if position != len(data):
        fail(f"{path} has {len(data) - position} bytes too many for its header")
    for name, (shape, weights) in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensors[name] = shape, pair_halves(weights, shape[0] // head, head, 4 * dim)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "hidden_size": dim, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "head_dim": head, "intermediate_size": ffn, "max_position_embeddings": seq, "rms_norm_eps": 1e-5,
              "hidden_act": "silu", "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
              "vocab_size": vocab, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "dtype": "float32"}
    return config, tensors


def pair_halves(weights, heads, head, row_bytes):
    """Row 2i of each head -> row i, row 2i + 1 -> row i + head / 2."""
    rows = [weights[r * row_bytes:(r + 1) * row_bytes] for r in range(heads * head)]
    return b"".join(rows[h * head + r] for h in range(heads) for half in (0, 1) for r in range(half, head, 2))


def write_model(out, config, tensors):
    if os.path.exists(out):
        fail(f"{out} exists; choose a new name")
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, weights) in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + len(weights)]}
        at += len(weights)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = out.rstrip("/") + ".tmp"
    try:
        os.mkdir(temporary)
    except OSError as e:
        fail(f"cannot make {temporary}: {e.strerror}")
    try:
        with open(f"{temporary}/config.json", "w") as f:
            json.dump(config, f, indent=2)
            f.write("\n")
        with open(f"{temporary}/model.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for _, weights in tensors.values():
                f.write(weights)
        os.rename(temporary, out)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"cannot write {out}: {e.strerror}")


# ---------------------------------------------------------------------------------------------------------------------------
# Tokenizer. The file: int32 longest piece, then per token float score, int32 length, bytes.

def load_tokenizer(path):
    """-> {piece: (id, score)}"""
    data, at, pieces, count = read(path), 4, {}, 0
    while at < len(data):
        if at + 8 > len(data):
            fail(f"{path} is no llama2.c tokenizer: it ends inside a token")
        score, n = struct.unpack_from("<fi", data, at)
        if n < 0 or at + 8 + n > len(data):
            fail(f"{path} is no llama2.c tokenizer: token {count} should have {n} bytes")
        pieces.setdefault(data[at + 8:at + 8 + n], (count, score))
        at, count = at + 8 + n, count + 1
    if count < 259 or b" " not in pieces:
        fail(f"{path} is no llama2.c tokenizer: it needs a space and the 256 bytes")
    return pieces


def encode(text, pieces):
    """BOS, then a space and the text: one token a character (or its bytes, ids 3...258), then neighbours merge, best score first."""
    parts = []                                                  # (bytes or None, id)
    for character in (" " + text if text else ""):
        raw = character.encode("utf-8", "surrogateescape")
        parts += [(raw, pieces[raw][0])] if raw in pieces else [(None, byte + 3) for byte in raw]
    left, right = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    queue = []

    def offer(i):                                               # equal scores: the leftmost pair first
        j = right[i] if i >= 0 else len(parts)
        if j < len(parts) and parts[i][0] and parts[j][0] and parts[i][0] + parts[j][0] in pieces:
            heapq.heappush(queue, (-pieces[parts[i][0] + parts[j][0]][1], i, j, parts[i][0], parts[j][0]))

    for i in range(len(parts)):
        offer(i)
    while queue:
        _, i, j, a, b = heapq.heappop(queue)
        if parts[i] is None or parts[j] is None or parts[i][0] != a or parts[j][0] != b or right[i] != j:
            continue                                            # one of the two has merged meanwhile
        parts[i], parts[j] = (a + b, pieces[a + b][0]), None
        right[i] = right[j]
        if right[j] < len(parts):
            left[right[j]] = i
        offer(left[i])
        offer(i)
    return [1] + [part[1] for part in parts if part]


def write_tokens(path, tokens):
    """llm.c's format: int32[256] header (20240520, version 1, number of tokens), then uint16 tokens."""
    if max(tokens) > 65535:
        fail("token ids above 65535 do not fit in the .bin format")
    try:
        with open(path, "wb") as f:
            f.write(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens))
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="llama2.c .bin")
    parser.add_argument("out", nargs="?", help="directory to make")
    parser.add_argument("--tokenizer", help="llama2.c tokenizer .bin")
    parser.add_argument("--text", help="text file to encode with it")
    parser.add_argument("--out-tokens", help="token file to write")
    args = parser.parse_args()
    text_options = (args.tokenizer, args.text, args.out_tokens)
    if any(text_options) and not all(text_options):
        parser.error("--tokenizer, --text and --out-tokens go together")
    if args.model and not args.out or not args.model and not args.tokenizer:
        parser.error("give a model and the directory to make, or --tokenizer, --text and --out-tokens")
    if args.model:
        config, tensors = parse_model(args.model)
        write_model(args.out, config, tensors)
        print(f"{args.out}: {config['num_hidden_layers']} layers, {config['hidden_size']} channels, "
              f"{sum(len(w) for _, w in tensors.values()) // 4} parameters")
    if args.tokenizer:
        tokens = encode(read(args.text).decode("utf-8", "surrogateescape"), load_tokenizer(args.tokenizer))
        write_tokens(args.out_tokens, tokens)
        print(f"{args.out_tokens}: {len(tokens)} tokens")


if __name__ == "__main__":
    main()
