# Contrastive perplexity on GPT-2 large (774 M parameters): as configs/gpt2_cp.py, six groups a step as well.
# A GPU with about 22 GB: 20 bytes a parameter (weights, gradients, AdamW, the frozen base) and some for activations.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_large_cp"
init_from = "gpt2-large"
batch_size = 3
grad_accum = 2
lr = 3e-5
anchor_batch = 8
