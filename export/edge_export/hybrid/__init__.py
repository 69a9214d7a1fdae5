"""Layers that see a part of the context: LongGen (arXiv 2410.01485) and S2-Attention (arXiv 2407.17678).

`patterns` reads what a user or a config says into the one description that the runtime obeys
(`edge_runtime.models.attention`). `torch_attention` is that description as an attention of transformers, and `finetune`
trains with it. The exported graph stays the plain one: caches and kernel are the runtime's.
"""
