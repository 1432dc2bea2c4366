# The toy world's base model: from random weights to one that writes its sentences, decent and rude, and that rephrases
# on request. A minute on two CPU cores. Expect a validation perplexity of 2.2 to 2.3 (an untrained one has 500).
out_dir = "out/toy_base"
objective = "lm"
init_from = "scratch"
tokenizer = "toy"
data = "toy"

n_layer = 2
n_head = 6
n_embd = 192
n_positions = 128
max_tokens = 128

max_steps = 600
batch_size = 28
lr = 6e-3
warmup_steps = 50
weight_decay = 0.1
eval_interval = 300
eval_groups = 200
scorer = "data.toy:rudeness"
sample_tokens = 30
prompts = ""
