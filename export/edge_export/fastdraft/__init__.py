"""FastDraft: train a small draft for any target and align it with what the target itself writes.

Source: Zafrir et al. 2024 (arXiv 2411.11055). Three stages, each a single pass: pre-train on text, continue on code
mixed with text, fine-tune on the target's own answers.
"""
