# Contrastive perplexity on GPT-2 large (774 M parameters): as configs/gpt2_cp.py, six groups a step as well.
# LoRA leaves the weights as they are, and the base shares them: 4 bytes a parameter while they are loaded, then 2 of
# most, and some for activations, how many has not been measured. The learning rate is scaled, not tuned.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_large_cp"
init_from = "gpt2-large"
batch_size = 3
grad_accum = 2
lr = 5e-4
anchor_batch = 8
