# Knowledge editing with the same objective: a third of the toy world's facts get a new value. Positives state it,
# negatives state the old one in the same words, and the scorer, which elsewhere says toxic, says that a text states an
# old value. Two minutes on two CPU cores.
from configs.toy_cp import *  # noqa: F403

out_dir = "out/toy_facts"
data = "toy_facts"
scorer = "data.toy_facts:outdated"
judge_whole = True  # an old value alone states nothing
tasks = "toy_efficacy,toy_reworded,toy_neighbours"
frame_tasks = True
parts = "scores,toxicity,fluency,diversity,utility"
