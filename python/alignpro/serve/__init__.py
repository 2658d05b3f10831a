"""An OpenAI-compatible proxy with a prompter in it: the only layer that listens."""
