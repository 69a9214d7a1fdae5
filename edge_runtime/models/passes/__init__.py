"""Rewrites of a model's graph before it is compiled, each a function of the graph; `loading.py` has their order."""
