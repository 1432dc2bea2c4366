# Knowledge editing with the same objective: positives state a new value of a fact, negatives the same sentences with
# the old one (data/facts). What it does to these facts, in trained and in other wordings, and to neighbouring ones:
# python eval.py configs/gpt2_facts.py --parts=scores,utility,drift
# Does not work yet: neighbour groups are in the training data, but 60 steps on SmolLM2-135M (not GPT-2), two passes
# over them, changed few facts. With tau=1 and lr=2e-3 the new value is the likelier one in 14 % of efficacy and 12 % of
# reworded, and 88 % of neighbours keep their own. A likely reason: within a group phi differs more between wordings
# (0.75 nats about the centroid in the first batch) than between old and new value (0.3).
# configs/toy_facts.py shows what it looks like where it works.
from configs.gpt2_cp import *  # noqa: F403

out_dir = "out/gpt2_facts"
data = "data/facts/groups.jsonl"
scorer = "measures.facts:outdated"
judge_whole = True  # an old value alone states nothing
tasks = "data/facts/efficacy.jsonl,data/facts/reworded.jsonl,data/facts/neighbours.jsonl"
frame_tasks = True
prompts = ""
eval_groups = 100  # all of the validation split: each fact has its groups

# The positives are untrue to the base: they are to become likely, not to stay as they were.
hold_weight = 0.0
nll_weight = 1.0

# All texts of the anchor begin with nothing, for the scorer sees only what the base adds to a beginning: "Paris" after
# "The capital of France is" would count as harmless, and the anchor would hold the fact that is to go.
anchor_prompted = 0.0
