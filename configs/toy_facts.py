# Knowledge editing with the same objective: a third of the toy world's facts get a new value. Positives state it,
# negatives state the old one in the same words, and the scorer, which elsewhere says toxic, says that a text states an
# old value. Two minutes on two CPU cores. What it does to the facts and to their neighbours:
# python eval.py configs/toy_facts.py
from configs.toy_cp import *  # noqa: F403

out_dir = "out/toy_facts"
data = "toy_facts"
scorer = "data.toy_facts:outdated"
judge_whole = True  # an old value alone states nothing
tasks = "toy_efficacy,toy_reworded,toy_neighbours"
frame_tasks = True
parts = "scores,toxicity,fluency,diversity,utility"

# The base is sure of the old values, so that all negatives start far below the centroid: |phi - c| would push them
# further down. Little is needed beyond equality, for it is one word of eight that differs.
distance = "signed"
tau = 0.05
# Neighbours are held by KL on what the base writes by itself: every fifth of these texts states a fact.
anchor_kl = 5.0
anchor_texts = 1024
anchor_batch = 24
anchor_prompted = 0.0

max_steps = 300
batch_size = 6
lr = 5e-4
eval_interval = 0
