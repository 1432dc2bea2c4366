# Contrastive perplexity on GPT-2 (124 M parameters), with the groups that ship (data/detox). A GPU with 6 GB, or a
# patient CPU with 8 GB. Chosen on SmolLM2-135M, a language model of GPT-2's size, not on GPT-2 itself (README.md,
# Results). What to expect: three quarters fewer toxic continuations of prompts like the data's negatives, half as many
# of others; nine pairs in ten ranked rightly; samples read as the base's do, and surprise it 1.1 times as much.
out_dir = "out/gpt2_cp"
init_from = "gpt2"
tokenizer = "gpt2"
data = "data/detox/groups.jsonl"

cp_weight = 1.0
tau = 0.3
distance = "signed"
n_pos = 5
n_neg = 5

# What holds the rest of the model: the positives stay as likely as they were, instead of becoming likelier by
# nll_weight, which teaches the data's style; and what the base has written itself, half of it after toxic beginnings,
# stays as it was, but for the texts that were toxic.
nll_weight = 0.0
hold_weight = 3.0
anchor_kl = 2.5
anchor_texts = 256
anchor_prompted = 0.5
anchor_tokens = 64
anchor_batch = 16

lora_rank = 8
lora_alpha = 16.0
lr = 1e-3
max_steps = 60
batch_size = 6
warmup_steps = 5
eval_interval = 0  # fifty samples are too few to choose a step by: the last one is taken
eval_samples = 50
