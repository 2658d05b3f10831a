"""What a reader sees: tables in the terminal, plots, warnings, one self-contained HTML file.

All of them read the same two things, both plain data, of which any part may be absent:

* ``report`` (report.json): model, reward, seed, versions, config, seconds by stage,
  peak_rss_bytes, tokens_per_second, and
  - ``arms.{raw, static, untuned, trained, optimum, tuned}``: mean_reward, reward_variance, ci95, n,
    components, response_tokens, rewrite_tokens, copy_rate, empty_rewrites; static: ``instruction``;
  - ``paired.trained_minus_X``: mean, ci95; ``gap_closed``: share, ci95; kl_per_rewrite and
    kl_per_token (nats);
  - ``judge``: name, ``comparisons.A_vs_B``: n, wins, ties, losses, win_rate, ci95,
    length_controlled_win_rate, length_controlled_ci95, order_disagreements, mean_length_difference;
  - ``headroom`` and ``bound``: as their commands write them;
  - ``samples``: prompt, and rewrite_X, response_X, reward_X of every arm X;
* ``metrics`` (metrics.jsonl): one dict per training step.

``build.build_report`` gathers them from a run's directory and writes the page. Prompts, rewrites
and responses are untrusted text: nothing of theirs is read as markup.
"""
