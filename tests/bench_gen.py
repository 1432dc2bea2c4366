"""Throughput of data_gen.py's sampling beside a plain loop over transformers' generate: same prompts, samples, lengths.

    python tests/bench_gen.py MODEL_FOLDER [SEEDS [SAMPLES [SHOTS]]]       # 16 seeds x 16 samples, 3 demonstrations

Seeds are the first inputs of the shipped groups, demonstrations those of configs/gpt2_data.py. Both sides sample with
top-p 0.9, both prompts of each seed, and write exactly 32 tokens each time. Every side runs in a process of its own,
first in fp32, then under bf16 autocast.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NEW = 32


def setting(model, seeds, k, shots, dtype):
    """The Config of one side. seeds: a text file."""
    from configs import load_config

    flags = [f"--init_from={model}", f"--seeds={seeds}", f"--k={k}", f"--shots={shots}", f"--dtype={dtype}"]
    n = len(Path(seeds).read_text().splitlines())
    return load_config("data_gen", [str(ROOT / "configs/gpt2_data.py"), f"--batch_size={n}", *flags])


def plain(config):
    """One prompt at a time, its samples in one call."""
    from transformers import GPT2LMHeadModel

    import data
    import data_gen
    from data.prompts import prompt_for
    from engine.device import amp

    model, tokenizer = GPT2LMHeadModel.from_pretrained(config.init_from).float().eval(), data.get_tokenizer("gpt2")
    seeds, _ = data_gen.read_seeds(config)
    shown, _ = data_gen.draw_demonstrations(config, seeds)
    how = dict(do_sample=True, top_p=config.top_p, top_k=0, num_return_sequences=config.k, pad_token_id=0)
    began, tokens = time.time(), 0
    for seed in seeds:
        for side in data_gen.SIDES:
            prompt = shown[side] + prompt_for(getattr(config, side + "_prompt"), seed.text)
            idx = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]])
            with amp(torch.device("cpu"), getattr(torch, config.dtype)):
                out = model.generate(
                    idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW, min_new_tokens=NEW, **how
                )
            tokens += (out.size(1) - idx.size(1)) * len(out)
    return tokens, time.time() - began


def ours(config):
    import data_gen

    seeds, _ = data_gen.read_seeds(config)
    began = time.time()
    sampler = data_gen.Sampler(config, seeds)  # reads the demonstrations: part of the work
    usable, _ = data_gen.usable_seeds(sampler, seeds)
    assert len(usable) == len(seeds)
    for seed in usable:
        seed.max_new = NEW
    sampler.stop = {side: [] for side in data_gen.SIDES}
    with sampler.setup.amp():
        for side in data_gen.SIDES:
            data_gen.sample_answers(sampler, usable, side, 0)
    return 2 * len(seeds) * config.k * NEW, time.time() - began


def main(model, n="16", k="16", shots="3"):
    import data

    inputs = [g.input for g in data.read_groups(ROOT / "data/detox/groups.jsonl")]
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds.txt"
        seeds.write_text("\n".join(inputs[: int(n)]))
        for dtype in ("float32", "bfloat16"):
            rate = {}
            for which in ("plain", "ours"):
                command = [sys.executable, __file__, which, model, str(seeds), k, shots, dtype, "run"]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                tokens, seconds = json.loads(text.splitlines()[-1])
                rate[which] = tokens / seconds
                print(
                    f"{dtype:9} {which:5} {tokens:,} tokens in {seconds:.1f} s: {rate[which]:,.0f} a second", flush=True
                )
            print(f"{dtype:9} {rate['ours'] / rate['plain']:.2f} x")


if __name__ == "__main__" and len(sys.argv) > 6:
    which, model, seeds, k, shots, dtype, _ = sys.argv[1:]
    print(json.dumps({"plain": plain, "ours": ours}[which](setting(model, seeds, int(k), int(shots), dtype))))
elif __name__ == "__main__":
    main(*sys.argv[1:])
