# Groups sampled from the toy base: paraphrases of events that it has never read, decent and rude, in half a minute.
# Then: python train.py configs/toy_cp.py --data=out/toy_data/groups.jsonl --anchor_nll=2 --out_dir=out/toy_own
# This base has learned to paraphrase from the prompt alone, so that it needs no demonstration (shots).
out_dir = "out/toy_data"
init_from = "configs/toy_base.py"
tokenizer = "toy"
seeds = "toy"
demos = "toy"
scorer = "data.toy:rudeness"

shots = 0
k = 32
batch_size = 32
temperature = 0.6
min_overlap = 0.6
max_length = 3.0
