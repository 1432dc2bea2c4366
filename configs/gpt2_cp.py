# Contrastive perplexity on GPT-2 (124 M parameters).
# Until a natural data set ships, the groups are the toy world's sentences: right for trying things out, too plain to
# detoxify a model for real. Give your own groups as --data=FILE.jsonl.
# Any GPU with 6 GB, or a CPU with 8 GB and patience. These settings are not tuned yet. What to expect for now: the
# positives' perplexity falls to a third, the negatives' to less than half of what it was, most pairs are ranked
# rightly, and the samples, drawn towards toy sentences, become about twice as surprising to the base: the run warns.
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
lr = 5e-5
warmup_steps = 10
eval_interval = 50
eval_samples = 50
