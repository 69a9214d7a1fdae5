"""Convert and train models: the Torch side of edge-run, installed with the extra `export`.

`convert.export_model` turns a Hugging Face or ONNX causal language model into a folder that `edge_runtime` loads.
"""
