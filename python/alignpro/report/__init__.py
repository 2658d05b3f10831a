"""What a reader sees: tables in the terminal, plots, warnings, one self-contained HTML file.

All of them read an `evaluate.results.Report`, of which any part may be absent, and the rows of
metrics.jsonl, one a training step. ``build.build_report`` gathers them from a run's directory and
writes the page. Prompts, rewrites and responses are untrusted text: nothing of theirs is read as
markup.
"""
