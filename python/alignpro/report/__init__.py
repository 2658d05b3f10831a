"""What a reader sees: tables in the terminal, plots, one self-contained HTML file.

All of them read the same three things, all plain data:

* ``report`` (report.json): model, reward, seed, versions, config, ``arms.{raw,untuned,trained}``
  with mean_reward, reward_variance, ci95, n and components, ``paired.{trained_minus_raw,
  trained_minus_untuned}`` with mean and ci95, kl_per_rewrite, tokens_per_second, seconds by stage,
  peak_rss_bytes, samples;
* ``metrics`` (metrics.jsonl): one dict per training step;
* ``samples``: prompt, rewrite_untuned, rewrite_trained, response_raw, response_untuned,
  response_trained, reward_raw, reward_trained; any may be absent but the prompt.

Prompts, rewrites and responses are untrusted text: nothing of theirs is read as markup.
"""
