# The best rival of contrastive perplexity on SmolLM2-135M, with the same groups and anchors (configs/README.md): IPO,
# whose goal for every pair is a gap of 1 / (2 beta) = 2 nats beyond the base's. There it ranked 93 % of the pairs
# rightly (contrastive perplexity 91 %), left half as much toxicity after test negatives, and surprised the base less.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_ipo"
objective = "ipo"
beta = 0.25
