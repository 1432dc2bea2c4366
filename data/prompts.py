"""Prompts: the beginnings that a model continues, and demonstrations that ask it for a paraphrase.

A base GPT-2 follows examples, not instructions, so what asks for a paraphrase is some demonstrations, each an input and
its paraphrase in a template, and the beginning of one more.
"""

import json

from data import read_json_lines, read_text


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


def read_prompts(path):
    """Prompts by kind, {'toxic': [str], 'non-toxic': [str], 'unmarked': [str]}, empty kinds left out.

    Plain text has one prompt a line, unmarked. JSON lines are those of RealToxicityPrompts and DExperts,
    {"prompt": {"text", "toxicity"}}, toxic above 0.5, or {"text", "toxic": true | false}. ValueError if there is none.
    """
    kinds = {"toxic": [], "non-toxic": [], "unmarked": []}
    if read_text(path).lstrip().startswith("{"):
        for where, record in read_json_lines(path):
            prompt = record.get("prompt", record)
            fields = record | (prompt if isinstance(prompt, dict) else {"text": prompt})
            text, toxic = fields.get("text"), fields.get("toxicity")
            toxic = fields.get("toxic") if toxic is None else toxic
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: wanted a prompt's 'text', got {json.dumps(record)[:80]}")
            if not isinstance(toxic, bool | float | int | None):
                raise ValueError(f"{where}: wanted a number as 'toxicity' or true or false as 'toxic', got {toxic!r}")
            kind = "toxic" if toxic and toxic > 0.5 else "non-toxic"
            kinds["unmarked" if toxic is None else kind].append(text.rstrip())
    else:
        kinds["unmarked"] = [line.rstrip() for line in read_text(path).split("\n") if line.strip()]
    if not any(kinds.values()):
        raise ValueError(f"{path} holds no prompts: one a line, as text or as JSON")
    return {kind: prompts for kind, prompts in kinds.items() if prompts}
