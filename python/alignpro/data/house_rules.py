"""The rules of the packaged task "house_rules", as a team would write them down.

Rewards and models read none of this: the texts are what a prompter competes with. Their wording was
chosen on training prompts (``tests/bench/house_rules.py`` measures it).
"""

from __future__ import annotations

# kind -> its instruction. Evaluation with the true label appends these; "" leaves a prompt alone.
HOUSE_RULES = {
    "how_to": "Be brief. Give three numbered steps.",
    "yes_no": "Is it Yes or No, and why?",
    "ideas": 'Be brief. Begin with "Here are 5 ideas for".',
    "fact": "Be brief: one sentence.",
    "trouble": "Answer in a warm, caring tone.",
    "as_asked": "",
}

# All of them as one instruction, for every prompt alike.
POLICY = (
    "If this asks how to do something, be brief and give three numbered steps. If it is a yes/no "
    "question, begin with Yes or No and say why. If it asks for ideas, be brief and list 5 ideas. "
    "If it asks for a fact, be brief: one sentence. If somebody is in trouble, answer in a warm, "
    "caring tone. If it already says how to answer, do just that."
)
