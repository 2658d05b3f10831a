"""Does the response stay on the prompt's topic? A share of words: cheap, bounded, explainable."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from alignpro.optional import import_for
from alignpro.types import Texts

# A word may hold apostrophes inside ("don't"); underscores and punctuation part words.
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")

# Function words and the verbs of asking ("tell me about ..."): they say nothing about the topic.
_STOP_WORD_LIST = """
a about above across after again against all almost along already also although always am among an
and another any anybody anyone anything are aren't around as at away be became because become been
before behind being below between both but by can can't cannot could couldn't describe did didn't
do does doesn't doing don't done down during each either else ever every everyone everything
explain few for from further get gets getting give go goes going got had hadn't has hasn't have
haven't having he he's her here hers herself him himself his how how's however i i'd i'll i'm i've
if in into is isn't it it's its itself just let let's like list lot lots made make makes many may
maybe me might mine more most much must my myself need needs neither never no nobody none nor not
nothing now of off often on once one only onto or other others our ours ourselves out over own per
perhaps please quite rather really same shall she she's should shouldn't since so some somebody
someone something sometimes still such suggest tell than that that's the their theirs them
themselves then there there's these they they'd they'll they're they've thing things this those
though through thus to too toward towards under until up upon us very via want wants was wasn't
way ways we we'd we'll we're we've well were weren't what what's whatever when where where's
whether which while who who's whole whom whose why will with within without won't would wouldn't
yes yet you you'd you'll you're you've your yours yourself yourselves
"""
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())


class TopicReward:
    """Share of the prompt's content words that the response mentions, in [0, 1].

    Content words are the distinct stems (Snowball English) of the prompt's words without stop
    words. A prompt without any content word ("Why not?") scores 1: nothing can be missed.
    The rewrite is not looked at: the topic is that of the *original* prompt.
    """

    name = "topic"

    def __init__(self) -> None:
        self._snowball = import_for("TopicReward", "snowballstemmer")

    def __call__(
        self, prompts: Texts, rewrites: Texts, responses: Texts, **columns: Sequence[Any]
    ) -> list[float]:
        # A stemmer keeps state while it works: one for each call, so that threads may share self.
        stem = functools.cache(self._snowball.stemmer("english").stemWord)
        return [
            _share_mentioned(prompt, response, stem)
            for prompt, response in zip(prompts, responses, strict=True)
        ]


def _share_mentioned(prompt: str, response: str, stem: Callable[[str], str]) -> float:
    topic = content_stems(prompt, stem)
    if not topic:
        return 1.0
    mentioned = {stem(word) for word in _words(response)}
    return len(topic & mentioned) / len(topic)


def content_stems(text: str, stem: Callable[[str], str]) -> set[str]:
    """The distinct stems of the text's words without stop words."""
    return {stem(word) for word in _words(text) if word not in _STOP_WORDS}


def _words(text: str) -> list[str]:
    words = _WORD.findall(text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    # "dog's" is the word "dog"; "it's" stays whole, it is a stop word.
    return [w[:-2] if w.endswith("'s") and w not in _STOP_WORDS else w for w in words]
