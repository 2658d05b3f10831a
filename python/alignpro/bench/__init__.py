"""What `alignpro bench` measures: scoring and whole training steps, beside what is installed."""
