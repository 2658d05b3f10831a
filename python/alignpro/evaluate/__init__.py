"""The arms of an evaluation."""
