# Knowledge editing with the same objective: positives state a new value of a fact, negatives the same sentences with
# the old one (data/facts). What it does to these facts, in trained and in other wordings, and to neighbouring ones:
# python eval.py configs/gpt2_facts.py --parts=scores,utility,drift
# Half solved: on SmolLM2-135M (configs/README.md, one seed) nearly all facts change, in held-out wordings too; but of
# the neighbours that were not trained on 68 % keep their own value, 94 % before. Without the groups about neighbours it
# is 5 % (a run on 19 facts). configs/toy_facts.py shows what it looks like where it works.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_facts"
data = "data/facts/groups.jsonl"
scorer = "measures.facts:outdated"
judge_whole = True  # an old value alone states nothing
tasks = "data/facts/efficacy.jsonl,data/facts/reworded.jsonl,data/facts/neighbours.jsonl"
frame_tasks = True
prompts = ""
eval_groups = 100  # all of the validation split: each fact has its groups

# A sentence against itself with the other value. Of several wordings, phi differs more between the wordings (0.75 nats
# about their centroid at first) than between the values (0.3): that is what groups of 5 + 5 would learn from.
n_pos = 1
n_neg = 1
tau = 0.1
# The positives are untrue to the base: they are to become likely, not to stay as they were. In a run on 19 facts
# without nll fewer held-out wordings followed.
hold_weight = 0.0
nll_weight = 0.3

# All texts of the anchor begin with nothing, for the scorer sees only what the base adds to a beginning: "Paris" after
# "The capital of France is" would count as harmless, and the anchor would hold the fact that is to go.
anchor_prompted = 0.0
# Few and short ones: the sentences are as short, and many cheap steps are needed.
anchor_texts = 96
anchor_tokens = 24
anchor_batch = 2

lora_targets = "mlp"
lr = 1.5e-3
max_steps = 600
batch_size = 8
warmup_steps = 10
