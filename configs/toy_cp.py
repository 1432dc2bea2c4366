# Contrastive perplexity in the toy world: no download, no GPU, a minute and a half on two CPU cores.
# Makes its base first (configs/toy_base.py) if that is missing. Expect the toxic fraction of free samples to fall from
# about 45 % to 0, after toxic prompts from about 90 % to 0; after them the language suffers. Runs: configs/README.md.
out_dir = "out/toy_cp"
init_from = "configs/toy_base.py"
tokenizer = "toy"
data = "toy"

tau = 0.2
nll_weight = 1.0
n_pos = 5
n_neg = 5

max_steps = 200
batch_size = 8
lr = 3e-4
eval_interval = 100
scorer = "data.toy:rudeness"
sample_tokens = 30
prompts = ""
n_prompts = 20
shots = 0  # the toy base paraphrases without being shown how
