"""Are answers under load right? Facts found in documents, and greedy answers asked again alone, one at a time."""

import random
import time
from collections.abc import Callable, Sequence
from secrets import token_hex

import msgspec
import orjson

from leanserve.loadtest.completion import complete
from leanserve.loadtest.http_stream import Inbox
from leanserve.loadtest.prompts import Prompt
from leanserve.loadtest.record import Record
from leanserve.loadtest.target import Target
from leanserve.loadtest.workload import Turn

__all__ = ["Correctness", "Difference", "check_correctness"]


class Difference(msgspec.Struct, frozen=True):
    """A request whose answer under load was another than alone."""

    request: int
    """Its index."""
    prompt_tokens: int
    first: int
    """Index of the first token (or character, where no ids are known) that differs."""
    unit: str
    """token or character."""
    under_load: str
    """The answer from there on."""
    alone: str


class Correctness(msgspec.Struct, kw_only=True):
    """What was checked, and what was wrong."""

    needles_asked: int = 0
    """Successful requests that asked for a fact."""
    needles_found: int = 0
    needles_missed: list[int] = []
    """Indices of requests."""
    repeated: int = 0
    """Requests that were asked again alone."""
    equal: int = 0
    different: list[Difference] = []
    failed_alone: dict[int, str] = {}
    """Errors of those asked again, by index."""


async def check_correctness(
    target: Target,
    records: Sequence[Record],
    bodies: dict[int, bytes],
    *,
    repeat: int,
    seed: int,
    timeout_s: float,
    repeated: Callable[[int], None] = lambda done: None,
) -> Correctness:
    """Count needles, and ask at most `repeat` successful requests again. `repeated` is told of each."""
    asked = [record for record in records if record.needle_found is not None]
    found = Correctness(
        needles_asked=len(asked),
        needles_found=sum(bool(record.needle_found) for record in asked),
        needles_missed=[record.index for record in asked if not record.needle_found],
    )
    good = [record for record in records if record.outcome == "ok"]
    chosen = random.Random(f"repeat/{seed}").sample(good, min(repeat, len(good)))
    salt = token_hex(4)
    for done, record in enumerate(sorted(chosen, key=lambda record: record.index), 1):
        again = await _ask_again(target, record, bodies[record.index], salt, timeout_s)
        repeated(done)
        if again.error is not None:
            found.failed_alone[record.index] = f"{again.error_kind}: {again.error}"
            continue
        found.repeated += 1
        difference = _difference(record, again)
        if difference is None:
            found.equal += 1
        else:
            found.different.append(difference)
    return found


async def _ask_again(target: Target, record: Record, body: bytes, salt: str, timeout_s: float) -> Record:
    """The same request; nothing that the run left in a prefix cache is used, where the server allows to say so."""
    if "cache_salt" in target.extras:
        # The prompt is the long part, and stands first: the rest is found and rewritten without reading it.
        place = body.rindex(b'"cache_salt":"')
        end = body.index(b'"', place + len(b'"cache_salt":"'))
        body = body[:place] + b'"cache_salt":' + orjson.dumps(salt)[:-1] + body[end:]
    now_ns = time.perf_counter_ns()
    turn = Turn(record.index, Prompt("ids", b"", record.prompt_tokens_asked), record.output_tokens_asked)
    return await complete(
        target,
        Inbox(),
        body,
        turn,
        place=(record.conversation, record.turn),
        request_id=f"{record.request_id}-alone",
        intended_ns=now_ns,
        origin_ns=now_ns,
        timeout_s=timeout_s,
    )


def _difference(record: Record, again: Record) -> Difference | None:
    by_token = record.token_ids is not None and again.token_ids is not None
    if by_token and record.token_ids == again.token_ids:
        return None
    if not by_token and record.text == again.text:
        return None
    loaded, alone = (record.token_ids, again.token_ids) if by_token else (record.text, again.text)
    assert loaded is not None
    assert alone is not None
    first = next((at for at, pair in enumerate(zip(loaded, alone, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(loaded), len(alone)) if first is None else first
    shown = [
        str(answer[place : place + 12]) if by_token else str(answer[place : place + 60]) for answer in (loaded, alone)
    ]
    unit = "token" if by_token else "character"
    return Difference(record.index, record.context_tokens, place, unit, shown[0], shown[1])
