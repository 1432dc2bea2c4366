# Contrastive perplexity in the toy world. Makes its base first (configs/toy_base.py) if that is missing.
out_dir = "out/toy_cp"
init_from = "configs/toy_base.py"
tokenizer = "toy"
data = "toy"

tau = 0.1
nll_weight = 1.0
max_steps = 100
batch_size = 8
lr = 3e-4
