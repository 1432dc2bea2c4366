# Knowledge editing with the same objective: positives state a new value of a fact, negatives the same sentences with
# the old one (data/facts). What it does is told by
# python eval.py configs/gpt2_facts.py --parts=scores,utility,drift
# where "efficacy" are beginnings of trained wordings, "reworded" of held-out ones (the new value is to be likelier
# than the old one), and "neighbours" are facts that are to stay as they are. Not tuned yet: 40 steps on SmolLM2-135M
# (one seed, --anchor_texts=96) took the first from 2 to 55 %, the second from 2 to 50 %, and the third from 95 to 50 %.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_facts"
data = "data/facts/groups.jsonl"
scorer = "measures.facts:outdated"
tasks = "data/facts/efficacy.jsonl,data/facts/reworded.jsonl,data/facts/neighbours.jsonl"
prompts = ""
eval_groups = 100  # all of the validation split: each fact has its groups

# The positives are untrue to the base: they are to become likely, not to stay as they were.
hold_weight = 0.0
nll_weight = 1.0

# All texts of the anchor begin with nothing. The scorer judges a continuation without its prompt, so "Paris" after
# "The capital of France is" would count as harmless, and the anchor would hold the fact that is to go.
anchor_prompted = 0.0
