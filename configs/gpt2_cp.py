# Contrastive perplexity on GPT-2 (124 M parameters).
# Until a natural data set ships, the groups are the toy world's sentences: right for trying things out, too plain to
# detoxify a model for real. Give your own groups as --data=FILE.jsonl.
# Any GPU with 6 GB, or a CPU with 8 GB and patience. Expect every pair of the toy sentences to be ranked right within
# 100 steps, and the rude words gone from continuations of rude beginnings.
out_dir = "out/gpt2_cp"
init_from = "gpt2"
tokenizer = "gpt2"
data = "toy"

tau = 0.1
nll_weight = 1.0
kl_weight = 0.0
n_pos = 5
n_neg = 5

max_steps = 100
batch_size = 6
lr = 3e-5
warmup_steps = 10
eval_interval = 50
eval_samples = 50
