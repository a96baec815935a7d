"""LeanServe: serve very long contexts on several GPUs.

The public face is the command line (`leanserve --help`), the OpenAI-compatible HTTP API, and the two names below.
Both are imported on first use, so that `import leanserve` stays cheap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leanserve.contracts.sampling import SamplingParams
    from leanserve.llm import LLM

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from leanserve.llm import LLM

        return LLM
    if name == "SamplingParams":
        from leanserve.contracts.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'leanserve' has no attribute {name!r}; public names: {', '.join(__all__)}")
