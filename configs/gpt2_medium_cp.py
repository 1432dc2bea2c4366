# Contrastive perplexity on GPT-2 medium (355 M parameters): as configs/gpt2_cp.py, six groups a step as well.
# A GPU with about 12 GB: 20 bytes a parameter (weights, gradients, AdamW, the frozen base) and some for activations.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_medium_cp"
init_from = "gpt2-medium"
batch_size = 6
grad_accum = 1
lr = 5e-5
