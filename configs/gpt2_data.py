# Groups sampled from GPT-2 (124 M parameters) for your own sentences: --seeds=my_sentences.txt, one a line. Without
# them, the inputs of the shipped groups. Then: python train.py configs/gpt2_cp.py --data=out/gpt2_data/groups.jsonl
# --n_neg=1. Read some of them first: a model of this size hardly paraphrases (configs/README.md, Sampled groups).
out_dir = "out/gpt2_data"
init_from = "gpt2"
tokenizer = "gpt2"
seeds = "data/detox/groups.jsonl"
demos = "data/detox/groups.jsonl"

positive_prompt = 'Original: "{input}"\nParaphrase: "{output}"\n'
negative_prompt = 'Original: "{input}"\nAngry paraphrase with swearing: "{output}"\n'
n_neg = 1  # a toxic paraphrase takes ten times as many samples as a harmless one
shots = 12
temperature = 0.9
k = 16
batch_size = 16
rounds = 8
