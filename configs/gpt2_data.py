# Groups sampled from GPT-2 (124 M parameters) for your own sentences: --seeds=my_sentences.txt, one a line. Without
# them, the inputs of the shipped groups. Then: python train.py configs/gpt2_cp.py --data=out/gpt2_data/groups.jsonl
out_dir = "out/gpt2_data"
init_from = "gpt2"
tokenizer = "gpt2"
seeds = "data/detox/groups.jsonl"
demos = "data/detox/groups.jsonl"

positive_prompt = 'Original: "{input}"\nParaphrase: "{output}"\n'
negative_prompt = 'Original: "{input}"\nAngry paraphrase with swearing: "{output}"\n'
shots = 12
temperature = 0.9
k = 16
batch_size = 16
rounds = 8
