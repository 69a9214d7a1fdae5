"""The tiny models for the export tests."""

from tests.tiny_models import tiny_hf, tiny_ir

__all__ = ["tiny_hf", "tiny_ir"]
