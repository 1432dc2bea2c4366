"""Another attribute than toxicity: how informal a text is. The scorer of configs/gpt2_formal_data.py.

With demonstrations (data/formal.jsonl) and two prompts, this is all that a new attribute needs.
"""

import re

import numpy as np

# Words and endings that mark a register. Both lists are short and English.
CASUAL = frozenset(
    """ain't awesome aw bet bit bloke bro btw buddy bunch bye cause chill cool cos crazy cuz dad dude dunno folks fun
    gimme gonna gotta grab guess guy guys ha heads-up hey hi kinda kid kids kidding lemme lol lots mate mess mom mum nah
    nope ok okay oops ouch outta pal pop psst quick reckon sec sorta stuff super sure thanks thing tons totally
    ugh wanna wow whoa y'all ya yeah yep yikes yo yup""".split()
)
FORMAL = frozenset(
    """accordingly acknowledge additional advised apologise apologize appreciate approximately assistance attend
    colleagues commence concerning confirm consequently convenience dear depart due ensure furthermore gratitude hereby
    however inform informed inconvenience kindly moreover notify obtain permitted pleased pleasure please prior provide
    purchase receive regarding regret remain request requested require required respectfully shall sincerely submit
    sufficient therefore unable unavailable unfortunately upon whom wish wishes would""".split()
)
CONTRACTION = re.compile(r"\w'(?:s|re|ve|ll|d|m)\b|n't\b")


def informality(texts):
    """Informality of texts, list[str] -> array in [0, 1]: a logistic function of casual minus formal marks (words of
    the two lists, contractions, exclamation marks), 0.5 without any."""
    marks = []
    for text in texts:
        text = text.lower().replace("\u2019", "'")
        words = re.findall(r"[a-z]+(?:['-][a-z]+)*", text)
        casual = sum(w in CASUAL for w in words) + len(CONTRACTION.findall(text)) + text.count("!")
        marks.append(casual - sum(w in FORMAL for w in words))
    return 1 / (1 + np.exp(-1.5 * np.array(marks)))
