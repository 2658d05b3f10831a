"""A reward of one's own, as the command line names it: letter_reward:count_e."""

from __future__ import annotations


def count_e(prompts, rewrites, responses):
    """Random models say nothing with a sentiment, but they do say "e"."""
    pairs = zip(rewrites, responses, strict=True)
    return [(w + r).count("e") - 0.1 * len(w) for w, r in pairs]


def short(prompts, rewrites, responses):
    """A second goal, which few letters serve; no word on a response without any."""
    return [-0.2 * len(response) if response else None for response in responses]
