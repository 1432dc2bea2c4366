"""What was published for GPT-2, and whether ours meets it."""

import math

from measures import open_setup, report
from measures.report import MEASURES
from measures.tasks import measure_task, published_file, read_task
from measures.texts import measure_text, read_measured_text

# What published models reach: what, measure, published, tolerance, source. Sources are GitHub threads unless named.
EXPECTED = {
    "gpt2": [
        ("wikitext2", "text_ppl", 29.94, 0.05, "transformers#13761 and llm.c#276: test, context = stride = 1024"),
        ("wikitext2", "text_ppl_stride", 25.2, 0.1, "Ilharco et al. 2023, arXiv 2212.04089: stride 512"),
        ("wikitext2", "word_ppl", 37.37, 0.05, "transformers#13761: lm-eval word_perplexity"),
        ("lambada", "acc", 0.3256, 0.001, "lm-eval#2159: lambada_openai"),
        ("lambada", "ppl", 40.06, 0.1, "lm-eval#2159: lambada_openai"),
        ("piqa", "acc", 0.6289, 0.001, "model card crumb/gpt2023 (its gpt2 row)"),
        ("hellaswag", "acc", 0.2892, 0.001, "llm.c dev/data/hellaswag.py: lm-eval"),
        ("hellaswag", "acc_norm", 0.3114, 0.001, "llm.c dev/data/hellaswag.py: lm-eval"),
    ],
    "gpt2-medium": [
        ("wikitext2", "text_ppl", 21.7, 0.1, "Lee et al. 2024, arXiv 2401.01967: stride 1024"),
        ("wikitext2", "text_ppl_stride", 18.5, 0.1, "Ilharco et al. 2023, arXiv 2212.04089: stride 512"),
    ],
    "gpt2-large": [
        ("wikitext2", "text_ppl", 19.44, 0.05, "transformers, docs/perplexity: stride 1024"),
        ("wikitext2", "text_ppl_stride", 16.44, 0.05, "transformers, docs/perplexity: stride 512"),
    ],
    "gpt2-xl": [
        ("hellaswag", "acc", 0.4004, 0.001, "llm.c dev/data/hellaswag.py: lm-eval"),
        ("hellaswag", "acc_norm", 0.5089, 0.001, "llm.c dev/data/hellaswag.py: lm-eval"),
    ],
}


# Settings of the protocol of Lee et al. 2024 (arXiv 2401.01967), for the prompts of data.prompts.read_challenging.
CHALLENGING = dict(temperature=0.0, sample_tokens=20, k=1, n_prompts=0)

# Toxicity that others found in GPT-2: {what was measured, and by what: [(model, toxic, mean score, perplexity)]}.
TOXICITY = {
    "Lee et al. 2024, arXiv 2401.01967: gpt2-medium, 1,199 prompts, 20 tokens; Perspective, largest of 7 attributes; "
    "WikiText-2, stride 1024": [
        ("base", "-", "0.453", "21.7"),
        ("DPO", "-", "0.208", "23.34"),
        ("minus the toxicity direction", "-", "0.245", "23.56"),
    ],
    "the same prompts, gpt2-medium, 10 tokens; Detoxify; perplexity of the samples": [
        ("base", "-", "0.480", "9.0"),
        ("word filter", "-", "0.323", "13.8"),
        ("ProFS", "-", "0.243", "12.4"),
        ("RAD", "-", "0.213", "13.3"),
    ],
    "Ilharco et al. 2023, arXiv 2212.04089: 1,000 generations; Detoxify; WikiText, stride 512": [
        ("gpt2", "3.7%", "0.04", "25.2"),
        ("gpt2, minus toxic task vector", "2.5%", "0.03", "25.3"),
        ("gpt2-medium", "4.3%", "0.06", "18.5"),
        ("gpt2-medium, minus toxic task vector", "1.8%", "0.02", "18.9"),
        ("gpt2-large", "4.8%", "0.06", "16.4"),
        ("gpt2-large, minus toxic task vector", "0.8%", "0.01", "16.9"),
    ],
}


def toxicity_table(compared, scorer):
    """TOXICITY, and below it ours after challenging prompts, by the scorer of that name and by the others. compared:
    {place: {name: dict(base, tuned, n, ...)}}."""
    names, rows = ("toxicity_fraction", "toxicity_mean", "text_ppl"), []
    for heading, published in TOXICITY.items():
        rows += [report.wrap(heading), *([f"  {model}", *numbers] for model, *numbers in published)]
    text = compared.get("text wiki.test.raw", {})
    for place, measures in compared.items():
        where, _, other = place.partition(", by ")
        if where.endswith(", challenging"):
            size = f"{measures['toxicity_mean']['n']:,} prompts, {CHALLENGING['sample_tokens']} tokens"
            rows.append(report.wrap(f"here: {size}; {other or scorer}; WikiText-2 with --text=wikitext2"))
            for side in ("base", "tuned"):
                numbers = [(measures | text).get(name, {}).get(side) for name in names]
                rows.append([f"  {side}", *map(report.format_number, names, numbers)])
    warned = "scorers differ: another one puts other numbers on the same texts, so compare rows of one block only"
    return report.format_table(["", "toxic", "mean", "perplexity"], rows) + "\n" + report.wrap(warned, "WARNING ")


def check_published(config):
    """--check=NAME: measure a published model (or --base=FOLDER in its place) in fp32 against published numbers.
    Returns True if all are within their tolerance; what could not be measured fails."""
    if config.check not in EXPECTED:
        raise ValueError(f"no published numbers for {config.check!r}, only for {', '.join(EXPECTED)}")
    config.dtype, config.tokenizer = "float32", "gpt2"
    setup = open_setup(config, {"model": config.base or config.check})
    model, tokenizer = setup.models["model"], setup.tokenizer
    measured, rows, good = {}, [], True
    for source in dict.fromkeys(e[0] for e in EXPECTED[config.check]):
        try:
            path = published_file(source)
        except OSError as e:
            print(f"not measured: {e}")
            continue
        if source == "wikitext2":
            text = read_measured_text(path, tokenizer)
            measured[source] = measure_text(model, tokenizer, *text, model.config.n_positions)
        else:
            measured[source] = measure_task(model, tokenizer, read_task(path), source)
    for source, name, published, tolerance, where in EXPECTED[config.check]:
        value = MEASURES[name].of(measured[source][name]) if source in measured else math.nan
        ok = abs(value - published) <= tolerance
        good &= ok
        numbers = [report.format_number(name, x) for x in (value, published, tolerance)]
        verdict = "ok" if ok else "DIFFERS" if source in measured else "not measured"
        rows += [[f"{source}: {MEASURES[name].label.strip()}", *numbers, verdict], f"    {where}"]
    print(report.format_table([config.check, "measured", "published", "tolerance", ""], rows))
    return good
