"""Compiled models: how each is compiled, what its caches hold, and one forward over many sequences."""
