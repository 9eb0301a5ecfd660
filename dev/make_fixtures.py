#!/usr/bin/env python3
"""Numbers made with PyTorch that test_fp4 compares against, and checks of our checkpoints with transformers.

  make_fixtures.py make [dev/fixtures]          writes the fixtures (they are in the repository: run it only to change them)
  make_fixtures.py check-export DIR EXPECTED    loads our checkpoint DIR with transformers, runs the tokens in EXPECTED
                                                (safetensors: tokens I32 [B, T], logits F32 [B, T, vocab]), compares the logits
  make_fixtures.py make-hf DIR {gpt2,llama} TEXTFILE
                                                writes a random model (bytes as tokens, about 1M parameters) with save_pretrained
                                                and prints its mean loss on TEXTFILE, to compare with train_fp4 --eval-only

Needs torch, transformers 5.x, safetensors and numpy; no GPU. Everything is computed in float32 with eager attention, one thread,
fixed seeds. Another version of PyTorch may give other random numbers, but the files say all inputs, so tests do not care.
"""
import argparse
import json
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")   # everything is made here or read from a directory

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

STEPS, CLIP = 3, 1.0
ADAMW = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
WEIGHT_DECAY = 0.1


# ---------------------------------------------------------------------------------------------------------------------------
# Small models: logits, loss, every gradient, and three steps of AdamW

def gpt2(vocab, positions, layers, channels, heads):
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=positions, n_embd=channels, n_layer=layers, n_head=heads, bos_token_id=None,
                                      eos_token_id=None, attn_implementation="eager", **no_dropout))


def llama(vocab, positions, layers, channels, heads, kv_heads, ffn, tied, theta=10000.0, head_dim=None, eps=1e-5):
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=positions, hidden_size=channels, num_hidden_layers=layers,
                                        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=ffn,
                                        rms_norm_eps=eps, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
                                        rope_parameters={"rope_type": "default", "rope_theta": theta}, attn_implementation="eager"))


def randomize(model, seed):
    """Every parameter away from its trivial value, large enough that each matters in the logits and that clipping at 1.0 happens."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                scale = 0.25 if "wte" in name or "embed" in name or "wpe" in name else 1.3 / math.sqrt(model.config.hidden_size)
                p.copy_(torch.randn(p.shape, generator=g) * scale)
            elif name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=g))     # norms
            else:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))         # biases


def decayed(name, p):
    """Weight decay: matrices, but no embedding. An lm_head of its own is a matrix like others; a tied one is the embedding."""
    return p.dim() >= 2 and not any(word in name for word in ("wte", "wpe", "embed_tokens"))


def model_loss(model, tokens, targets):
    logits = model(input_ids=tokens).logits
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_model(model, directory, seed, B=2, T=20):
    randomize(model, seed)
    model.eval()
    model.save_pretrained(directory)
    os.chmod(f"{directory}/model.safetensors", 0o644)
    if os.path.exists(f"{directory}/generation_config.json"):
        os.remove(f"{directory}/generation_config.json")
    g = torch.Generator().manual_seed(seed + 1)
    vocab = model.config.vocab_size
    tokens = torch.randint(0, vocab, (B, T), generator=g)
    targets = torch.randint(0, vocab, (B, T), generator=g)      # not the next tokens: nothing but their place makes them targets
    logits, loss = model_loss(model, tokens, targets)
    loss.backward()
    out = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits.detach(), "loss": loss.detach().reshape(1)}
    parameters = dict(model.named_parameters())                 # a tied lm_head is listed once, as the embedding
    for name, p in parameters.items():
        out["grad." + name] = p.grad.clone()

    groups = [dict(params=[p for n, p in parameters.items() if decayed(n, p)], weight_decay=WEIGHT_DECAY),
              dict(params=[p for n, p in parameters.items() if not decayed(n, p)], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, foreach=False, fused=False, **ADAMW)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _, loss = model_loss(model, tokens, targets)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP, foreach=False))
        optimizer.step()
        losses.append(loss.detach())
    out["adamw.losses"] = torch.stack(losses)
    out["adamw.grad_norms"] = torch.stack(norms).detach()       # before clipping
    out["adamw.loss_after"] = model_loss(model, tokens, targets)[1].detach().reshape(1)
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight", "transformer.ln_f.bias", "transformer.h.0.attn.c_proj.weight"):
        if name in parameters:                                  # one tensor of each kind, decayed and not
            out["adamw.after." + name] = parameters[name].detach().clone()
    about = dict(ADAMW, weight_decay=WEIGHT_DECAY, clip=CLIP, steps=STEPS)
    save(out, f"{directory}/expected.safetensors", {"adamw": about, "decayed": [n for n, p in parameters.items() if decayed(n, p)]})
    print(f"{directory}: {sum(p.numel() for p in parameters.values())} parameters, losses {[round(float(x), 4) for x in losses]}, "
          f"gradient norms {[round(float(x), 3) for x in norms]}")


# ---------------------------------------------------------------------------------------------------------------------------
# Single operations. Names are OP.VALUE; dX is the gradient of sum(out * dout) with respect to X.

def backward(out, dout, **inputs):
    grads = torch.autograd.grad(out, list(inputs.values()), dout)
    return {"d" + name: grad for name, grad in zip(inputs, grads)}


def kernel_cases():
    g = torch.Generator().manual_seed(5)
    randn = lambda *shape, scale=1.0: (torch.randn(shape, generator=g) * scale)
    leaf = lambda t: t.requires_grad_(True)
    cases = {}

    def put(op, **tensors):
        for name, t in tensors.items():
            cases[f"{op}.{name}"] = t.detach().clone().contiguous()

    # AdamW, three steps, one tensor: gradients from 1e-9 to 1e2, some exactly 0 (eps matters, then does not)
    n = 257
    p = leaf(randn(n))
    grads = randn(STEPS, n) * 10 ** (torch.rand((STEPS, n), generator=g) * 11 - 9)
    grads[:, ::16] = 0
    optimizer = torch.optim.AdamW([p], weight_decay=WEIGHT_DECAY, foreach=False, fused=False, **ADAMW)
    put("adamw", param=p, grads=grads)
    after = []
    for step in range(STEPS):
        p.grad = grads[step].clone()
        optimizer.step()
        after.append(p.detach().clone())
    state = optimizer.state[p]
    put("adamw", param_after=torch.stack(after), m_after=state["exp_avg"], v_after=state["exp_avg_sq"])

    x = leaf(torch.cat([randn(500, scale=2.0), torch.linspace(-12, 12, 101), torch.tensor([0.0, -0.0, 1e-6, -1e-6])]))
    dout = randn(*x.shape)
    out = F.gelu(x, approximate="tanh")
    put("gelu", x=x, out=out, dout=dout, **backward(out, dout, x=x))

    T, C = 7, 80
    x, w, b, dout = leaf(randn(T, C) + 0.5), leaf(1 + randn(C, scale=0.3)), leaf(randn(C)), randn(T, C)
    out = F.layer_norm(x, (C,), w, b, eps=1e-5)
    put("layernorm", x=x, weight=w, bias=b, out=out, dout=dout, **backward(out, dout, x=x, weight=w, bias=b))
    x, w, dout = leaf(randn(T, C) + 0.5), leaf(1 + randn(C, scale=0.3)), randn(T, C)
    out = F.rms_norm(x, (C,), w, eps=1e-5)
    put("rmsnorm", x=x, weight=w, out=out, dout=dout, **backward(out, dout, x=x, weight=w))

    T, ffn = 5, 24
    gate_up, dout = leaf(randn(T, 2 * ffn, scale=2.0)), randn(T, ffn)
    out = F.silu(gate_up[:, :ffn]) * gate_up[:, ffn:]
    put("swiglu", gate_up=gate_up, out=out, dout=dout, **backward(out, dout, gate_up=gate_up))

    # Mean over the rows that have a target of (cross entropy + z * log(sum(exp(logits)))^2); -1 marks a row without one
    rows, vocab, z = 9, 101, 1e-2
    logits, targets = leaf(randn(rows, vocab, scale=3.0)), torch.randint(0, vocab, (rows,), generator=g)
    targets[[2, 7]] = -1
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    lse = torch.logsumexp(logits, -1)
    valid = targets >= 0
    total = (losses + z * lse * lse)[valid].sum() / valid.sum()
    put("cross_entropy", logits=logits, targets=targets.int(), losses=losses, z_loss=torch.tensor([z]), grad_scale=1 / valid.sum().reshape(1).float(),
        dlogits=torch.autograd.grad(total, logits)[0])

    # Causal attention with shared key/value heads: head h reads kv head h // (H / KV). Layout [B, H, T, D].
    B, T, H, KV, D = 1, 37, 4, 2, 32
    q, k, v, dout = leaf(randn(B, H, T, D)), leaf(randn(B, KV, T, D)), leaf(randn(B, KV, T, D)), randn(B, H, T, D)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    put("attention", q=q, k=k, v=v, out=out, dout=dout, **backward(out, dout, q=q, k=k, v=v))

    # Rotary embedding as in LlamaForCausalLM: pairs (i, i + D/2), angle position * theta^(-2i/D). Layout [B, H, T, D].
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    B, T, H, D, theta = 1, 11, 2, 16, 10000.0
    x, dout = leaf(randn(B, H, T, D)), randn(B, H, T, D)
    config = LlamaConfig(hidden_size=H * D, num_attention_heads=H, max_position_embeddings=T, rope_parameters={"rope_type": "default", "rope_theta": theta})
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
    out = apply_rotary_pos_emb(x, x, cos, sin)[0]
    put("rope", x=x, out=out, dout=dout, theta=torch.tensor([theta]), **backward(out, dout, x=x))
    return cases


def save(tensors, path, about):
    # One metadata key only: safetensors writes several in random order, and the files should be the same every time
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"about": json.dumps(dict(about, torch=torch.__version__.split("+")[0]))})
    os.chmod(path, 0o644)


def make(args):
    out = args.dir
    os.makedirs(out, exist_ok=True)
    torch.manual_seed(1)
    make_model(gpt2(101, 40, layers=2, channels=48, heads=3), f"{out}/gpt2", 11)
    make_model(llama(101, 40, layers=2, channels=48, heads=6, kv_heads=2, ffn=80, tied=False), f"{out}/llama", 22)
    # tied embedding; heads wider than channels / heads; another theta and eps
    make_model(llama(101, 40, layers=1, channels=32, heads=2, kv_heads=1, ffn=48, tied=True, theta=500.0, head_dim=24, eps=1e-3), f"{out}/llama_tied", 33)
    save(kernel_cases(), f"{out}/kernels.safetensors", {"adamw": dict(ADAMW, weight_decay=WEIGHT_DECAY), "norm_eps": 1e-5})
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(out) for f in files)
    print(f"{out}: {size} bytes")


# ---------------------------------------------------------------------------------------------------------------------------
# Our checkpoints in transformers, and the other way round

def check_export(args):
    expected = load_file(args.expected)
    for name in ("tokens", "logits"):
        if name not in expected:
            sys.exit(f"error: {args.expected} has no tensor '{name}'")
    model, info = AutoModelForCausalLM.from_pretrained(args.dir, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            sys.exit(f"error: transformers reports {what} in {args.dir}: {info[what]}")
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"].long()).logits
    if logits.shape != expected["logits"].shape:
        sys.exit(f"error: logits are {list(logits.shape)} in transformers, {list(expected['logits'].shape)} in {args.expected}")
    difference = float((logits - expected["logits"]).abs().max())
    print(f"{type(model).__name__} {args.dir}: max |logits difference| {difference:.3g}, largest logit {float(logits.abs().max()):.3g}")
    if not difference <= args.tolerance:      # a NaN fails
        sys.exit(f"error: more than {args.tolerance:g}")


def make_hf(args):
    torch.manual_seed(args.seed)
    if args.family == "gpt2":
        model = gpt2(256, 256, layers=5, channels=128, heads=4)
    else:
        model = llama(256, 256, layers=5, channels=128, heads=4, kv_heads=2, ffn=352, tied=False)
    model.eval()
    model.save_pretrained(args.dir)
    with open(args.textfile, "rb") as f:
        text = torch.frombuffer(bytearray(f.read()), dtype=torch.uint8).long()
    T = args.seq
    windows = (len(text) - 1) // T            # window i: tokens iT .. iT+T-1, targets one further
    windows = min(windows, args.windows) if args.windows else windows
    if windows < 1:
        sys.exit(f"error: {args.textfile} has {len(text)} bytes, a window needs {T + 1}")
    total = 0.0
    with torch.no_grad():
        for first in range(0, windows, 16):
            at = torch.arange(first, min(first + 16, windows))[:, None] * T + torch.arange(T)[None]
            total += float(model_loss(model, text[at], text[at + 1])[1].double()) * len(at)
    print(f"{args.dir}: {model.num_parameters()} parameters, val loss {total / windows:.6f} on the first {windows} windows of {T} bytes of {args.textfile}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make")
    p.add_argument("dir", nargs="?", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures"))
    p.set_defaults(run=make)
    p = commands.add_parser("check-export")
    p.add_argument("dir")
    p.add_argument("expected")
    p.add_argument("--tolerance", type=float, default=1e-4)
    p.set_defaults(run=check_export)
    p = commands.add_parser("make-hf")
    p.add_argument("dir")
    p.add_argument("family", choices=["gpt2", "llama"])
    p.add_argument("textfile")
    p.add_argument("--windows", type=int, default=64, help="how many windows of the file (0: all)")
    p.add_argument("--seq", type=int, default=128, help="bytes in a window")
    p.add_argument("--seed", type=int, default=1)
    p.set_defaults(run=make_hf)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    main()
