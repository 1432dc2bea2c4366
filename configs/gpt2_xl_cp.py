# Contrastive perplexity on GPT-2 xl (1558 M parameters): as configs/gpt2_cp.py, six groups a step as well.
# A GPU with about 40 GB: 20 bytes a parameter (weights, gradients, AdamW, the frozen base) and some for activations.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_xl_cp"
init_from = "gpt2-xl"
batch_size = 2
grad_accum = 3
lr = 2e-5
anchor_batch = 5
