"""LAMBADA and PIQA of a GPT-2 here, and one example at a time with transformers: the same numbers, and their time.

    python tests/bench_eval.py MODEL_FOLDER lambada.jsonl piqa.jsonl [wiki.test.raw]

The plain version is the loop that everybody writes: for every example and choice one forward pass in fp32, all logits.
Both run in fp32, each in a process of its own. With a text file, its perplexities are compared as well.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def pairs(tokenizer, context, continuation):
    """Token ids of both, split as lm-eval does."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, ids = tokenizer.encode_ordinary(context + continuation), tokenizer.encode_ordinary(context)
    return ids, whole[len(ids) :]


@torch.no_grad()
def plain_task(model, tokenizer, path):
    limit, right, normed, nll = model.config.n_positions, [], [], []
    for item in map(json.loads, Path(path).read_text().splitlines()):
        choices = item.get("choices") or [item["continuation"]]
        logp = []
        for choice in choices:
            context, target = pairs(tokenizer, item["query" if "query" in item else "context"], " " + choice)
            idx = torch.tensor([(context + target)[-(limit + 1) :][:-1]])
            lp = model(idx).logits[0, -len(target) :].log_softmax(-1)
            logp.append(lp.gather(1, torch.tensor(target)[:, None]).double().sum().item())
            greedy = lp.argmax(-1).tolist() == target
        if "gold" in item:
            right.append(max(range(len(choices)), key=lambda i: logp[i]) == item["gold"])
            normed.append(max(range(len(choices)), key=lambda i: logp[i] / len(choices[i])) == item["gold"])
        else:
            right.append(greedy)
            nll.append(-logp[0])
    mean = lambda v: sum(v) / len(v)  # noqa: E731
    return {"acc": mean(right)} | ({"acc_norm": mean(normed)} if normed else {"ppl": math.exp(mean(nll))})


@torch.no_grad()
def plain_text(model, ids, context, stride):
    """Hugging Face's sliding window, pooled over the tokens that are really scored."""
    total, n, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        idx = torch.tensor([ids[begin:end]])
        labels = idx.clone()
        labels[:, : before - begin] = -100
        logits = model(idx).logits[0, :-1]
        loss = F.cross_entropy(logits, labels[0, 1:], reduction="none", ignore_index=-100)
        total, n, before = total + loss.double().sum().item(), n + int((labels[0, 1:] != -100).sum()), end
        if end == len(ids):
            break
    return math.exp(total / n)


def measure(which, folder, lambada, piqa, text=None):
    import data
    from measures.texts import wikitext_rows

    tokenizer, out = data.get_tokenizer("gpt2"), {}
    start = time.perf_counter()
    if which == "plain":
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(folder).float().eval()
        task = lambda path: plain_task(model, tokenizer, path)  # noqa: E731
    else:
        from engine.device import keep_freed_memory
        from measures.tasks import task_scores
        from measures.texts import text_perplexity
        from model import GPT

        keep_freed_memory()
        model = GPT.from_pretrained(folder)
        task = lambda path: task_scores(model, tokenizer, path)  # noqa: E731
    out["load"] = time.perf_counter() - start
    start = time.perf_counter()
    out |= {"lambada": task(lambada), "piqa": task(piqa)}
    out["seconds"] = time.perf_counter() - start
    if text:
        rows, L = wikitext_rows(data.read_text(text)), model.config.n_positions
        ids = tokenizer.encode_ordinary(rows)
        for name, stride in (("disjoint", L), ("strided", L // 2)):
            if which == "plain":
                out[name] = plain_text(model, ids, L, stride)
            else:
                out[name] = text_perplexity(model, tokenizer, rows, L, stride)["ppl"]
        out["tokens"] = len(ids)
    return out


def main():
    if sys.argv[1] in ("plain", "ours"):
        print(json.dumps(measure(*sys.argv[1:])))
        return
    result = {}
    for which in ("plain", "ours"):
        command = [sys.executable, __file__, which, *sys.argv[1:]]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        result[which] = json.loads(out.splitlines()[-1])
        print(which, json.dumps(result[which], indent=2))
    print(f"ratio {result['plain']['seconds'] / result['ours']['seconds']:.2f} x")


if __name__ == "__main__":
    main()
