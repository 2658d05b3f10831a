"""Supervised warm start and reinforcement learning of the prompter."""
