"""Time and memory of one CP step on a 124 M GPT-2, here and written plainly with transformers, in turn.

    python tests/bench_step.py            # both, each in a process of its own; prints the ratios

The step: 6 groups of 5 + 5 sentences of 8 to 40 random tokens, forward, backward, clipping, AdamW, under bf16
autocast. The plain version pads to the longest sentence, makes all logits and takes the cross-entropy in fp32.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

G, P, N, STEPS = 6, 5, 5, 5


def sentences():
    """Framed rows idx (B, T) and their lengths: 8 to 40 tokens between a start and an end token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 41, (G * (P + N),), generator=generator) + 2
    return torch.randint(0, 50000, (len(lengths), int(lengths.max())), generator=generator), lengths


def plain(idx, lengths):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    mask = torch.arange(idx.size(1)) < lengths[:, None]

    def phi():
        logits = model(idx, attention_mask=mask.long()).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(len(idx), -1)
        return (nll * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)

    return model, phi


def ours(idx, lengths):
    from engine.device import keep_freed_memory
    from model import GPT, GPTConfig

    keep_freed_memory()
    model = GPT(GPTConfig())
    return model, lambda: model.sequence_nll(idx, lengths)


def measure(which):
    torch.manual_seed(0)
    idx, lengths = sentences()
    model, phi = {"plain": plain, "ours": ours}[which](idx, lengths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    from loss import contrastive_perplexity

    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            scores = phi().view(G, P + N)
        contrastive_perplexity(scores[:, :P], scores[:, P:])[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds[2:])[len(seconds[2:]) // 2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(seconds=median, tokens_per_second=int((lengths - 1).sum()) / median, peak_mb=peak)


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    result = {}
    for which in ("plain", "ours", "ours", "plain"):  # in turn, so that a drifting machine favours neither
        out = subprocess.run([sys.executable, __file__, which], capture_output=True, text=True, check=True).stdout
        m = json.loads(out.splitlines()[-1])
        speed = f"{m['seconds']:6.2f} s a step {m['tokens_per_second']:7.0f} scored tokens/s"
        print(f"{which:6} {speed} {m['peak_mb']:6.0f} MB")
        result.setdefault(which, []).append(m)
    mean = {w: {k: sum(m[k] for m in ms) / len(ms) for k in ms[0]} for w, ms in result.items()}
    ratio = mean["ours"]["tokens_per_second"] / mean["plain"]["tokens_per_second"]
    memory = mean["ours"]["peak_mb"] / mean["plain"]["peak_mb"]
    print(f"ratio  {ratio:.2f} x the scored tokens per second, {memory:.2f} x the peak memory")


if __name__ == "__main__":
    main()
