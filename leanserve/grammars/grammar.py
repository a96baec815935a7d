"""structured_outputs as llguidance's grammars: checked where requests come in, compiled again where tokens are sampled.

A check runs in a process of its own with little CPU time and memory, because no limit of the library itself bounds
every schema (twenty `pattern`s in one `allOf` compile for minutes). What passes is cheap for the rank that samples.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from leanserve.contracts.errors import RequestError
from leanserve.contracts.structured_outputs import StructuredOutputsParams

__all__ = ["check_grammar", "compile_grammar", "make_grammar_tokenizer"]

LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}
"""Of llguidance, in its own units: about 20 ms for a lexer, 7 ms for a step's lexemes, 3 ms for a step's items."""

CHECK_CPU_S = 0.2
"""CPU time to compile a grammar and make its first mask."""
CHECK_BYTES = 1 << 30
"""Memory of the process that checks, the interpreter included."""
CHECK_TIMEOUT_S = 10.0
"""Where the machine is so busy that no CPU time passes."""

_WHITESPACE = r"( |\n[ \t]{0,32})"
"""Between JSON tokens: a space, or a new line and its indentation; no way to go on for ever without a word."""


def grammar_text(wish: StructuredOutputsParams) -> str:
    """The grammar as llguidance reads it.

    Raises:
        RequestError: the schema is no JSON object.
    """
    if wish.grammar is not None:
        return LLMatcher.grammar_from_lark(wish.grammar)
    if wish.regex is not None:
        return LLMatcher.grammar_from_regex(wish.regex)
    if wish.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in wish.choice)
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    try:
        return LLMatcher.grammar_from_json_schema(
            '{"type": "object"}' if wish.json is None else wish.json, overrides={"whitespace_pattern": _WHITESPACE}
        )
    except ValueError as error:
        raise _refusal(wish, str(error)) from None


def check_grammar(wish: StructuredOutputsParams) -> None:
    """Find out whether a grammar can be served. Blocks for about 0.1 s, for 1 s at worst; answers are remembered.

    Raises:
        RequestError: it is wrong, matches nothing, or takes too long to compile.
    """
    try:
        reason = _why_not(grammar_text(wish))
    except _OutOfPatienceError as error:
        reason = str(error)
    if reason is not None:
        raise _refusal(wish, reason)


def make_grammar_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """What matchers know of a model's tokens; 0.7 s of work for a vocabulary of 128,000.

    Args:
        tokenizer_json: what the tokenizers library writes.
        vocab_size: of the model or the tokenizer, whichever is larger.
        eos_token_ids: tokens that end a text; none: what the tokenizer itself takes for one.
    """
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)


def compile_grammar(wish: StructuredOutputsParams, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the start of a text. It gives up the interpreter's lock while it compiles.

    Raises:
        RequestError: the grammar is wrong or beyond the limits.
    """
    matcher = LLMatcher(tokenizer, grammar_text(wish), log_level=0, limits=_parser_limits())
    if matcher.is_error():
        raise _refusal(wish, matcher.get_error())
    return matcher


def _parser_limits() -> LLParserLimits:
    return LLParserLimits(
        max_items_in_row=LIMITS["max_items_in_row"],
        initial_lexer_fuel=LIMITS["initial_lexer_fuel"],
        step_lexer_fuel=LIMITS["step_lexer_fuel"],
        step_max_items=LIMITS["step_max_items"],
        max_lexer_states=LIMITS["max_lexer_states"],
        max_grammar_size=LIMITS["max_grammar_size"],
        verbose_errors=False,
    )


class _OutOfPatienceError(Exception):
    """A check came to no end. Another time it may: this is no answer to be remembered."""


@lru_cache(maxsize=256)
def _why_not(text: str) -> str | None:
    """Why a grammar cannot be served; None: it can.

    Raises:
        _OutOfPatienceError: it is not known.
    """
    script = Path(__file__).with_name("check_process.py")
    settings = json.dumps({"limits": LIMITS, "cpu_s": CHECK_CPU_S, "memory_bytes": CHECK_BYTES})
    try:
        checked = subprocess.run(
            [sys.executable, "-P", str(script), settings],
            input=text.encode(),
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _OutOfPatienceError("it takes too long to compile; make it simpler") from None
    if checked.returncode != 0:
        raise _OutOfPatienceError(
            f"it takes more than {CHECK_CPU_S} s of CPU time, or too much memory, to compile; make it simpler"
        )
    return json.loads(checked.stdout)


def _refusal(wish: StructuredOutputsParams, reason: str) -> RequestError:
    kind = next(name for name in wish.__struct_fields__ if getattr(wish, name) not in (None, False))
    reason = reason.partition("\n<non-verbose/>")[0].strip()
    reason = {"NoExtension": "it matches no text", "NoExtensionBias": "it matches no text"}.get(reason, reason)
    return RequestError(
        f"structured_outputs: this {kind} cannot be used: {reason}", param="structured_outputs", code="invalid_grammar"
    )
