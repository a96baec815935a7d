"""What a check of a grammar finds out, and what it remembers."""

import pytest

from leanserve.contracts.errors import RequestError
from leanserve.contracts.structured_outputs import StructuredOutputsParams
from leanserve.grammars import grammar


def test_a_grammar_that_was_refused_because_the_machine_was_busy_may_come_again(monkeypatch) -> None:
    wish = StructuredOutputsParams(regex="[a-f]+ of this test alone")
    with monkeypatch.context() as busy:
        busy.setattr(grammar, "CHECK_TIMEOUT_S", 0.0)
        with pytest.raises(RequestError, match="too long to compile"):
            grammar.check_grammar(wish)
    grammar.check_grammar(wish)


def test_a_wrong_grammar_is_wrong_each_time() -> None:
    for _ in range(2):
        with pytest.raises(RequestError) as caught:
            grammar.check_grammar(StructuredOutputsParams(regex="(unclosed"))
        assert caught.value.code == "invalid_grammar"
