"""The rules of the packaged task "house_rules", as a team would write them down.

Rewards and models read none of this: the texts are what a prompter competes with. Their wording was
chosen on training prompts (``tests/bench/house_rules.py`` measures it).
"""

from __future__ import annotations

# kind -> its instruction. Evaluation with the true label appends these; "" leaves a prompt alone.
HOUSE_RULES = {
    "how_to": "Give three numbered steps, one short line each.",
    "yes_no": "Answer with Yes or No and a short reason.",
    "ideas": "Use bullet points.",
    "fact": "Be brief: one sentence.",
    "trouble": "Answer in a warm, caring tone.",
    "as_asked": "",
}

# All of them as one instruction, for every prompt alike.
POLICY = (
    "If this asks how to do something, give short numbered steps. If it is a yes/no question, "
    "begin with Yes or No and give a reason. If it asks for ideas, give a bulleted list. If it "
    "asks for a fact, answer in one short sentence. If somebody is in trouble, answer in a warm, "
    "caring tone. If it already says how to answer, do just that."
)
