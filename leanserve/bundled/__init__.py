"""The small model that ships with LeanServe, the corpus that made it, and its training script.

Cheap to import: no torch, no tokenizers.
"""

from pathlib import Path

__all__ = ["EXAMPLE_PROMPT", "bundled_model_dir"]

EXAMPLE_PROMPT = "Monday, 3 March. We sailed east"
"""The beginning of a text that the bundled model can go on with."""


def bundled_model_dir() -> Path:
    """Directory of the bundled checkpoint, in Hugging Face format: what `leanserve serve` without a MODEL serves."""
    return Path(__file__).with_name("model")
