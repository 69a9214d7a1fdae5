"""Measurements that `edge-run bench` runs on the user's own models and prompts, each beside its baselines.

prompts.py     the prompts and their categories
draft.py       drafting: acceptance, tokens for each step, speed-up, for a draft, prompt lookup, a random draft
rows.py        the figures of its report
steps.py       what one decoding step costs, and the speed-up that predicts
statistics.py  confidence intervals over prompts
plot.py        the figure (extra: bench)
"""
