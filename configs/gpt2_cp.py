# Contrastive perplexity on GPT-2 (124 M parameters), with the groups that ship (data/detox). A GPU with 6 GB, or a
# patient CPU with 8 GB. Chosen on a 30 M-parameter stand-in, not on GPT-2 itself (configs/README.md has the runs
# and what was tried): few steps, because most of the toxicity goes in the first ones and WikiText pays
# for the others. What to expect, by runs with the groups as they were before their negatives were made coarser: toxic
# continuations fall by about four fifths, also after decent beginnings; the positives become likelier; WikiText's
# perplexity rises by 5 %; samples surprise the base more, and the run may warn.
out_dir = "out/gpt2_cp"
init_from = "gpt2"
tokenizer = "gpt2"
data = "data/detox/groups.jsonl"

cp_weight = 3.0
tau = 1.0
distance = "signed"
nll_weight = 1.0
n_pos = 5
n_neg = 5

# What holds the rest of the model: decent texts that it has written itself, each read once.
anchor_nll = 1.0
anchor_texts = 512
anchor_prompted = 0.0
anchor_tokens = 64
anchor_batch = 16

max_steps = 30
batch_size = 6
lr = 8e-5
warmup_steps = 5
eval_interval = 0  # fifty samples are too few to choose a step by: the last one is taken
eval_samples = 50
