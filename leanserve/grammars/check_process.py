"""Compiles one grammar from standard input in a process that ends itself; a script, so that it starts fast.

Its only argument is JSON: `limits` of llguidance, `cpu_s` and `memory_bytes` of this process. It writes JSON: null, or
why the grammar cannot be used. It dies of a signal when its CPU time is over.
"""

import contextlib
import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer


def main() -> None:
    settings = json.loads(sys.argv[1])
    text = sys.stdin.buffer.read().decode()
    tokenizer = LLTokenizer("byte")
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"], settings["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, settings["cpu_s"])
    limits = LLParserLimits(**settings["limits"], verbose_errors=False)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print(json.dumps(matcher.get_error() if matcher.is_error() else None))


if __name__ == "__main__":
    main()
