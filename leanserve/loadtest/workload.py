"""What is asked: conversations of one turn or several, all written before the clock starts. Knows no server."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from leanserve.contracts.errors import ConfigError
from leanserve.loadtest.arrivals import ClosedLoop, OpenLoop
from leanserve.loadtest.lengths import Lengths
from leanserve.loadtest.prompts import Prompt, PromptKind, TokenRange, ids_prompt, needle_prompt, text_prompt

__all__ = ["Conversation", "Turn", "Workload", "WorkloadOptions", "write_workload"]

NEEDLE_DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Turn:
    """One request. Requests of a conversation's later turns begin with everything said before."""

    index: int
    prompt: Prompt
    """In a later turn, what is added."""
    output_tokens: int
    needle: str | None = None
    """What a right answer contains; None if it was not asked for a fact. Such requests may stop by themselves."""
    cancel_after_tokens: int | None = None
    """The client goes away after this many tokens; 0 is before the first one."""
    slow_reader: bool = False


@dataclass(frozen=True)
class Conversation:
    """Turns, each asked when the one before is answered."""

    turns: tuple[Turn, ...]
    start_s: float | None = None
    """Open loop: when it starts, from the run's start. Closed loop: None."""

    @property
    def longest_tokens(self) -> int:
        """Prompt and output of the last turn, if every answer has the length asked for."""
        return sum(turn.prompt.tokens + turn.output_tokens for turn in self.turns)


@dataclass(frozen=True)
class WorkloadOptions:
    """What a synthetic workload is made of."""

    requests: int = 40
    prompt_tokens: Lengths = field(default_factory=lambda: Lengths("512"))
    output_tokens: Lengths = field(default_factory=lambda: Lengths("64", "--output-tokens"))
    seed: int = 1
    prompts: PromptKind = "ids"
    ids: TokenRange = field(default_factory=TokenRange)
    shared_prefix_tokens: int = 0
    """Every prompt begins with these same tokens, which count as part of its length."""
    turns: int = 1
    turn_tokens: Lengths = field(default_factory=lambda: Lengths("64", "--turn-tokens"))
    """What a user adds in each later turn."""
    needle_share: float = 0.0
    """Of the requests, how many ask for a fact in a document."""
    cancel_share: float = 0.0
    slow_share: float = 0.0

    def __post_init__(self) -> None:
        if self.requests < 1 or self.turns < 1:
            raise ConfigError(f"--requests is {self.requests} and --turns {self.turns}; both must be at least 1")
        for option, share in (
            ("--needles", self.needle_share),
            ("--cancel", self.cancel_share),
            ("--slow-readers", self.slow_share),
        ):
            if not 0 <= share <= 1:
                raise ConfigError(f"{option} is {share:g}; it is a share of the requests, between 0 and 1")
        if self.turns > 1 and (self.needle_share or self.cancel_share):
            raise ConfigError("--turns does not go with --needles or --cancel: a later turn needs a plain answer")


@dataclass(frozen=True)
class Workload:
    """All conversations, and how they start."""

    conversations: tuple[Conversation, ...]
    arrivals: OpenLoop | ClosedLoop

    @property
    def requests(self) -> int:
        return sum(len(conversation.turns) for conversation in self.conversations)

    def check_fits(self, limit_tokens: int | None) -> None:
        """Raises: ConfigError with the numbers, where a request can never fit the server's limit."""
        if limit_tokens is None:
            return
        too_long = [c for c in self.conversations if c.longest_tokens > limit_tokens]
        if too_long:
            worst = max(too_long, key=lambda c: c.longest_tokens)
            output = sum(turn.output_tokens for turn in worst.turns)
            turns = f" over {len(worst.turns)} turns" if len(worst.turns) > 1 else ""
            raise ConfigError(
                f"{len(too_long)} of {len(self.conversations)} conversations cannot fit: the longest needs "
                f"{worst.longest_tokens - output:,} prompt + {output:,} output = {worst.longest_tokens:,} tokens"
                f"{turns}, and the server's limit is {limit_tokens:,}; ask for at most "
                f"{max(0, limit_tokens - output):,} prompt tokens, or start the server with a higher limit"
            )


def write_workload(
    options: WorkloadOptions,
    arrivals: OpenLoop | ClosedLoop,
    wrote: Callable[[int], None] = lambda index: None,
) -> Workload:
    """Write every prompt. Equal options give equal prompts on every machine. `wrote` is told each request's index.

    Raises:
        ConfigError: a length that a prompt of its kind cannot have.
    """
    # A stream of random numbers for each purpose: asking for cancels leaves lengths and prompts as they were.
    rngs = {name: random.Random(f"{name}/{options.seed}") for name in ("prompt", "output", "kind", "fault")}
    starts = arrivals.starts_s(options.requests, options.seed) if isinstance(arrivals, OpenLoop) else None
    conversations: list[Conversation] = []
    index = 0
    while index < options.requests:
        turns: list[Turn] = []
        for _ in range(min(options.turns, options.requests - index)):
            turns.append(_turn(options, index, rngs, first=not turns))
            wrote(index)
            index += 1
        start_s = starts[len(conversations)] if starts is not None else None
        conversations.append(Conversation(tuple(turns), start_s))
    return Workload(tuple(conversations), arrivals)


def _turn(options: WorkloadOptions, index: int, rngs: dict[str, random.Random], *, first: bool) -> Turn:
    output_tokens = options.output_tokens.draw(rngs["output"], index)
    is_needle = _every(options.needle_share, index)
    faulty = rngs["fault"].random()
    cancel_at = rngs["fault"].randrange(output_tokens)
    needle: str | None = None
    if not first:
        tokens = options.turn_tokens.draw(rngs["prompt"], index)
        prompt = _fresh(options, tokens, f"turn/{options.seed}/{index}")
    else:
        tokens = options.prompt_tokens.draw(rngs["prompt"], index)
        if is_needle:
            depth = rngs["kind"].choice(NEEDLE_DEPTHS)
            prompt, needle = needle_prompt(tokens, depth, options.seed * 1_000_003 + index)
        else:
            prompt = _opening(options, tokens, index)
    return Turn(
        index=index,
        prompt=prompt,
        output_tokens=output_tokens,
        needle=needle,
        cancel_after_tokens=cancel_at if faulty < options.cancel_share else None,
        slow_reader=options.cancel_share <= faulty < options.cancel_share + options.slow_share,
    )


def _every(share: float, index: int) -> bool:
    """True for `share` of the indices, spread evenly."""
    return int((index + 1) * share) > int(index * share)


def _opening(options: WorkloadOptions, tokens: int, index: int) -> Prompt:
    shared = options.shared_prefix_tokens
    if not shared:
        return _fresh(options, tokens, f"prompt/{options.seed}/{index}")
    if tokens <= shared:
        raise ConfigError(
            f"--shared-prefix-tokens is {shared:,} and a prompt has {tokens:,} tokens; every prompt must be longer"
        )
    prefix = _fresh(options, shared, f"prefix/{options.seed}")
    return prefix + _fresh(options, tokens - shared, f"prompt/{options.seed}/{index}")


def _fresh(options: WorkloadOptions, tokens: int, key: str) -> Prompt:
    return ids_prompt(tokens, key, options.ids) if options.prompts == "ids" else text_prompt(tokens, key)
