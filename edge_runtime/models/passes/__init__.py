"""Rewrites of a model's graph before it is compiled."""
