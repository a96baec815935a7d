"""Text that comes in pieces equals text that comes whole; stop strings do not depend on where tokens end."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanserve.server.detokenizer import TextStream
from leanserve.server.tokenizer import Tokenizer
from server.small_tokenizers import SAMPLES, byte_fallback, byte_level

TOKENIZERS = {"byte_level": Tokenizer(byte_level()), "byte_fallback": Tokenizer(byte_fallback())}


@pytest.fixture(params=TOKENIZERS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def pieces_of(stream: TextStream, token_ids: list[int]) -> list[str]:
    pieces: list[str] = []
    for token_id in token_ids:
        text, stopped = stream.push([token_id])
        pieces.append(text)
        if stopped:
            break
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("text", SAMPLES)
def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert "".join(pieces_of(TextStream(tokenizer), token_ids)) == tokenizer.decode(token_ids) == text


@pytest.mark.parametrize("text", SAMPLES)
def test_a_completion_continues_its_prompt(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    for cut in range(1, len(token_ids), 3):
        before, after = token_ids[:cut], token_ids[cut:]
        if "\ufffd" in tokenizer.decode(before):  # the prompt ends inside a character
            continue
        assert tokenizer.decode(before) + "".join(pieces_of(TextStream(tokenizer, (), before), after)) == text


def test_the_first_word_keeps_its_space(tokenizer: Tokenizer) -> None:
    prompt, completion = (
        tokenizer.encode("The cat"),
        tokenizer.encode("The cat sat")[len(tokenizer.encode("The cat")) :],
    )
    assert "".join(pieces_of(TextStream(tokenizer, (), prompt), completion)) == " sat"
    prompt = tokenizer.encode("The 😀😀😀😀")
    completion = tokenizer.encode("The 😀😀😀😀😀!")[len(prompt) :]
    assert "".join(pieces_of(TextStream(tokenizer, (), prompt), completion)) == "😀!"


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    pieces = pieces_of(TextStream(tokenizer), tokenizer.encode("你好 😀 ü"))
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_by_the_end_is_flushed(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a😀")[:-1]
    text = "".join(pieces_of(TextStream(tokenizer), token_ids))
    assert text == tokenizer.decode(token_ids)
    assert text.startswith("a")
    assert "\ufffd" in text


def test_special_tokens_have_no_text_unless_asked(tokenizer: Tokenizer) -> None:
    token_ids = [*tokenizer.encode("The cat"), *[2] * 40, *tokenizer.encode(" sat", add_special_tokens=False)]
    assert "</s>" not in "".join(pieces_of(TextStream(tokenizer), token_ids))
    shown = "".join(pieces_of(TextStream(tokenizer, skip_special_tokens=False), token_ids))
    assert shown.count("</s>") == 40


def test_text_after_a_run_of_special_tokens_keeps_its_space() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt, cat = tokenizer.encode("The"), tokenizer.backend.token_to_id("▁cat")
    assert cat is not None
    assert "".join(pieces_of(TextStream(tokenizer, (), prompt), [2] * 50 + [cat])) == " cat"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_never_become_text_cost_linear_time(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    bad = tokenizer.backend.token_to_id("ÿ" if name == "byte_level" else "<0xFF>")
    assert bad is not None
    stream = TextStream(tokenizer)
    began = time.thread_time()
    text = "".join(stream.push([bad])[0] for _ in range(8000)) + stream.finish()
    assert time.thread_time() - began < 2  # DecodeStream: 5 s, four times as much for twice as many
    assert set(text) == {"\ufffd"}


def test_any_tokens_at_all(tokenizer: Tokenizer) -> None:
    choose = random.Random(7)
    for _ in range(200):
        token_ids = [choose.randrange(tokenizer.vocab_size) for _ in range(40)]
        text = "".join(pieces_of(TextStream(tokenizer), token_ids))
        whole = tokenizer.decode(token_ids)
        assert text.replace("\ufffd", "") == whole.replace("\ufffd", "") or "\ufffd" in whole


def cut_at_stop(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The rule, slowly: read until a character completes a stop string; of several, take the one that began first."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=300)
@given(
    text=st.text(alphabet="abc☃", max_size=30),
    stops=st.lists(st.text(alphabet="abc☃", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
    data=st.data(),
)
def test_stop_strings_do_not_depend_on_token_borders(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = [token_id for part in _split(text, data) for token_id in tokenizer.encode(part)]
    stream = TextStream(tokenizer, stops, include_stop=include)
    pieces = pieces_of(stream, token_ids)
    expected, stop = cut_at_stop(text, stops, include=include)
    assert ("".join(pieces), stream.stop_string) == (expected, stop)


def _split(text: str, data: st.DataObject) -> list[str]:
    parts: list[str] = []
    while text:
        size = data.draw(st.integers(1, len(text)))
        parts.append(text[:size])
        text = text[size:]
    return parts


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ["aXYZ"])

    def push(text: str) -> str:
        return stream.push(tokenizer.encode(text))[0]

    assert [push("bb"), push("a"), push("X"), push("Y"), push("b"), push("a")] == ["bb", "", "", "", "aXYb", ""]
    assert stream.finish() == "a"
    assert stream.stop_string is None


def test_a_stop_string_may_begin_before_min_tokens_and_not_end_there() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ["ab", "XY"], min_tokens=4)
    assert pieces_of(stream, tokenizer.encode("abXYZ")) == ["", "ab", "", "", ""]
    assert stream.stop_string == "XY"
    stream = TextStream(tokenizer, ["XY"], min_tokens=9)
    assert "".join(pieces_of(stream, tokenizer.encode("aXYX"))) == "aXYX"


def test_a_stop_string_completed_by_the_flush_counts() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ["\ufffd"])
    assert pieces_of(stream, tokenizer.encode("a😀")[:-1]) == ["a", *[""] * (len(tokenizer.encode("a😀")) - 2), ""]
    assert stream.stop_string == "\ufffd"
