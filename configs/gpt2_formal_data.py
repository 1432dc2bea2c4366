# Another attribute: positives are formal, negatives informal. Two prompts, a few demonstrations and a scorer make it.
from configs.gpt2_data import *  # noqa: F403

out_dir = "out/gpt2_formal_data"
demos = "data/formal.jsonl"
scorer = "measures.formal:informality"
positive_prompt = 'Sentence: "{input}"\nFormal: "{output}"\n'
negative_prompt = 'Sentence: "{input}"\nInformal: "{output}"\n'
min_toxicity = 0.7  # of the scorer: 0.5 is a sentence without any mark of a register
