"""Throughput of data_gen.py's sampling beside a plain loop over transformers' generate: same prompts, samples, lengths.

    python tests/bench_gen.py MODEL_FOLDER [SEEDS [SAMPLES [SHOTS]]]       # 16 seeds x 16 samples, 3 demonstrations

Seeds and demonstrations are those of configs/gpt2_data.py. Both sides sample with top-p 0.9, both prompts of each seed,
and write exactly 32 tokens each time. Every side runs in a process of its own, first in fp32, then under bf16 autocast.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NEW = 32


def setting(model, seeds, k, shots, dtype):
    from configs import load_config

    flags = [f"--init_from={model}", f"--n_seeds={seeds}", f"--k={k}", f"--shots={shots}", f"--dtype={dtype}"]
    return load_config([str(ROOT / "configs/gpt2_data.py"), f"--batch_size={seeds}", *flags])


def plain(config):
    """One prompt at a time, its samples in one call."""
    from transformers import GPT2LMHeadModel

    import data
    import data_gen
    from model import amp

    model, tokenizer = GPT2LMHeadModel.from_pretrained(config.init_from).float().eval(), data.get_tokenizer("gpt2")
    seeds, _ = data_gen.read_seeds(config)
    shown, _ = data_gen.demonstrations(config, seeds)
    how = dict(do_sample=True, top_p=config.top_p, top_k=0, num_return_sequences=config.k, pad_token_id=0)
    began, tokens = time.time(), 0
    for seed in seeds:
        for side in data_gen.SIDES:
            prompt = shown[side] + data.prompt_for(getattr(config, side + "_prompt"), seed.text)
            idx = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]])
            with amp(torch.device("cpu"), getattr(torch, config.dtype)):
                out = model.generate(
                    idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW, min_new_tokens=NEW, **how
                )
            tokens += (out.size(1) - idx.size(1)) * len(out)
    return tokens, time.time() - began


def ours(config):
    import data_gen
    from model import amp, keep_freed_memory

    keep_freed_memory()
    seeds, _ = data_gen.read_seeds(config)
    began = time.time()
    sampler, usable, _ = data_gen.open_sampler(config, seeds)  # reads the demonstrations: part of the work
    assert len(usable) == len(seeds)
    sampler.stop = {side: [] for side in data_gen.SIDES}
    data_gen.Sampler.budget = lambda self, seed: NEW
    with amp(sampler.model.device, sampler.dtype):
        for side in data_gen.SIDES:
            data_gen.sample(sampler, usable, side, 0)
    return 2 * len(seeds) * config.k * NEW, time.time() - began


if __name__ == "__main__" and len(sys.argv) > 6:
    which, model, seeds, k, shots, dtype, _ = sys.argv[1:]
    print(json.dumps({"plain": plain, "ours": ours}[which](setting(model, int(seeds), int(k), int(shots), dtype))))
elif __name__ == "__main__":
    model, (seeds, k, shots) = sys.argv[1], [*sys.argv[2:], *"16 16 3".split()[len(sys.argv) - 2 :]]
    for dtype in ("float32", "bfloat16"):
        rate = {}
        for which in ("plain", "ours"):
            command = [sys.executable, __file__, which, model, seeds, k, shots, dtype, "run"]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            tokens, seconds = json.loads(text.splitlines()[-1])
            rate[which] = tokens / seconds
            print(f"{dtype:9} {which:5} {tokens:,} tokens in {seconds:.1f} s: {rate[which]:,.0f} a second", flush=True)
        print(f"{dtype:9} {rate['ours'] / rate['plain']:.2f} x")
