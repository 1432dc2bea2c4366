"""Prompts: the beginnings that a model continues, and demonstrations that ask it for a paraphrase.

A base GPT-2 follows examples, not instructions, so what asks for a paraphrase is some demonstrations, each an input and
its paraphrase in a template, and the beginning of one more.
"""

import re
from pathlib import Path

from data import is_score, wrong
from engine.run import read_records, read_text

MARKUP = r'\s*(\{\s*("|$)|\[\s*(["{]|$))'  # how a line of JSON begins


def few_shot(template, pairs):
    """Demonstrations: the template filled in with each (input, output)."""
    return "".join(template.format(input=unquoted(a), output=unquoted(b)) for a, b in pairs)


def prompt_for(template, sentence):
    """The beginning of one more demonstration: the template up to {output}. Quotation marks in it become single."""
    return template.split("{output}")[0].format(input=unquoted(sentence))


def unquoted(sentence):
    return " ".join(sentence.replace('"', "'").split())


def closing_tokens(template, tokenizer):
    """Ids that end an answer: tokens with the mark that follows {output}, or a line break, and the end token."""
    marks = {template.split("{output}")[1][0].encode(), b"\n"}
    holds = lambda t: any(m in tokenizer.decode_single_token_bytes(t) for m in marks)
    return [t for t in range(tokenizer.n_vocab - 1) if holds(t)] + [tokenizer.eot_token]


def answer(template, text):
    """(answer, whether it was closed) of what a model wrote behind `prompt_for`."""
    text, closed, _ = text.partition(template.split("{output}")[1][0])
    return text.split("\n")[0].strip(), bool(closed)


def form_filter(text, closed, templates):
    """One whole sentence, closed by the model, and nothing of the prompts in it."""
    if not closed or not text:
        return "empty" if closed else "no closing mark"
    if any(word in text for t in templates for word in t.split() if word.endswith(":")):
        return "holds prompt text"
    inner = text.rstrip("\"')]")
    if not (text[0].isupper() or text[0].isdigit()) or inner[-1:] not in (".", "!", "?"):
        return "no sentence"
    if any(a in ".!?" and b == " " and c.isupper() for a, b, c in zip(inner, inner[1:], inner[2:], strict=False)):
        return "more than one sentence"


def read_prompts(path):
    """[(file:line, prompt)] by kind, 'toxic', 'non-toxic' and 'unmarked', empty kinds left out.

    Text has one prompt a line, unmarked. A .json or .jsonl file has lines or an array, of texts or of what
    RealToxicityPrompts and DExperts have, {"prompt": {"text", "toxicity"}}, {"prompt": text, "toxicity"}, {"text",
    "toxicity"}, toxic above 0.5, or {"text", "toxic": true | false}.
    """
    ending, hint = Path(path).suffix.lower(), "give one prompt a line, as .txt or as .jsonl"
    if ending in (".csv", ".tsv", ".parquet"):
        raise ValueError(f"{path}: wanted one prompt a line as .txt, or JSON lines as .jsonl, got a {ending} file")
    if ending in (".json", ".jsonl"):
        records = read_records(path, "prompt file", hint, of=object)
        prompts = [(where, *_prompt(where, record)) for where, record in records]
    else:
        lines = enumerate(read_text(path, "prompt file", hint).split("\n"), 1)
        prompts = [(f"{path}:{n}", "unmarked", line.rstrip()) for n, line in lines if line.strip()]
        if markup := [(where, text) for where, _, text in prompts if re.match(MARKUP, text)]:
            raise wrong(markup[0][0], "plain text (JSON goes into a .jsonl file, without other lines)", markup[0][1])
    if not prompts:
        raise ValueError(f"{path} holds no prompts: {hint}")
    kinds = {"toxic": [], "non-toxic": [], "unmarked": []}
    for where, kind, text in prompts:
        kinds[kind].append((where, text))
    return {kind: found for kind, found in kinds.items() if found}


def read_challenging(path, tokenizer, tokens=32):
    """[(file:line, prompt)] of what RealToxicityPrompts' own file, prompts.jsonl, marks by {"challenging": true}, each
    cut at that many tokens. ValueError if it marks none."""
    hint = "give prompts.jsonl of RealToxicityPrompts"
    records = [(at, r) for at, r in read_records(path, "prompt file", hint) if r.get("challenging") is True]
    if not records:
        raise ValueError(f'{path} marks no prompt by "challenging": true: {hint}')
    cut = lambda text: tokenizer.decode(tokenizer.encode_ordinary(text)[:tokens], errors="ignore")  # half a character
    return [(at, cut(_prompt(at, r)[1])) for at, r in records]


def _prompt(where, record):
    """(kind, text) of a record."""
    fields = record if isinstance(record, dict) else {"text": record}
    prompt = fields.get("prompt", fields)
    fields = fields | (prompt if isinstance(prompt, dict) else {"text": prompt})
    text, toxicity, toxic = (fields.get(k) for k in ("text", "toxicity", "toxic"))
    if not isinstance(text, str) or not text.strip():
        raise wrong(where, "a text as the prompt's 'text'", record)
    if not is_score(toxicity):
        raise wrong(where, "a number from 0 to 1, or null, as 'toxicity'", toxicity)
    if not isinstance(toxic, bool | None):
        raise wrong(where, "true or false as 'toxic'", toxic)
    if toxicity is not None and toxicity == toxicity:  # not NaN
        toxic = toxicity > 0.5
    return {True: "toxic", False: "non-toxic", None: "unmarked"}[toxic], text.rstrip()
