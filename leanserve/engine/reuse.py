"""What of a sequence is in the prefix cache, or is just being computed by another. Knows tokens and names of pages; no
queue and no budget."""

from dataclasses import dataclass

from leanserve.contracts.kv_sharding import PageCopy, PageGrant
from leanserve.engine.pages import PageAllocator
from leanserve.engine.prefix_cache import PageNamer
from leanserve.engine.sequence import TOKEN_ID_BYTES, Sequence

__all__ = ["Cached", "PrefixReuse"]

_PAGES_NAMED_AT_ONCE = 64
"""A look-up that ends early has named so many pages too many at most: they need their names later anyway."""
_WORTH_COPYING = 4
"""A page is copied for a quarter of it, not for less: a copy is bound to the page's rank, whoever has less to read."""


@dataclass(frozen=True)
class Cached:
    """The beginning of a sequence that is in the cache."""

    pages: list[int]
    """Whole pages, to be shared."""
    source: int | None
    """The page after them that begins with the sequence's next tokens, to be copied; None if there is none."""
    source_tokens: int
    """How many of its tokens."""


class PrefixReuse:
    """Finds, names and publishes pages for sequences.

    A sequence that computes its prompt is known by the name of the page it is about to complete: who finds that name
    wanted may follow it, instead of computing the same page at the same time.
    """

    def __init__(self, allocator: PageAllocator, page_tokens: int, *, enabled: bool) -> None:
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._namer = PageNamer() if enabled else None
        self._leaders: dict[bytes, Sequence] = {}
        """By the name of the page that each is about to complete."""

    @property
    def enabled(self) -> bool:
        return self._namer is not None

    def find(self, sequence: Sequence) -> Cached:
        """What a waiting sequence can take over. Its newest token never is: the next one is sampled from it."""
        numbers: list[int] = []
        namer, page_tokens = self._namer, self._page_tokens
        if namer is None:
            return Cached(numbers, None, 0)
        num_pages = sequence.max_cached_tokens // page_tokens
        for first in range(0, num_pages, _PAGES_NAMED_AT_ONCE):
            end = min(first + _PAGES_NAMED_AT_ONCE, num_pages)
            numbers += self._allocator.find(self._names(sequence, first, end, namer))
            if len(numbers) < end:
                break
        start = len(numbers) * page_tokens
        following = self._allocator.following(self._parent(sequence, len(numbers), namer))
        if following is not None:
            wanted = sequence.token_bytes(start, min(start + page_tokens, sequence.max_cached_tokens))
            tokens = _common_tokens(following[1], wanted)
            if tokens * _WORTH_COPYING >= page_tokens:
                return Cached(numbers, following[0], tokens)
        return Cached(numbers, None, 0)

    def take_over(
        self,
        sequence: Sequence,
        cached: Cached,
        expected_pages: int,
        grants: list[PageGrant],
        copies: list[PageCopy],
    ) -> int:
        """Grant a sequence what is cached of it. Returns how many tokens it has beyond whole pages."""
        grants += self._allocator.share(sequence.pages, cached.pages)
        if cached.source is None:
            return 0
        made = self._allocator.copy(sequence.pages, cached.source, expected_pages)
        if made is None:
            return 0
        grants.append(made[0])
        copies.append(made[1])
        return cached.source_tokens

    def leader_of(self, sequence: Sequence, cached: Cached, step: int) -> Sequence | None:
        """Who completes, about now, the page that `sequence` would have to compute first; None if nobody before it."""
        ordinal = len(cached.pages)
        if self._namer is None or ordinal >= sequence.max_cached_tokens // self._page_tokens:
            return None
        leader = self._leaders.get(self._names(sequence, ordinal, ordinal + 1, self._namer)[0])
        if leader is None or leader.order > sequence.order or not self.leads(leader, sequence, step):
            return None
        return leader

    def leads(self, leader: Sequence, sequence: Sequence, step: int) -> bool:
        """Whether `leader` is about to complete a page that `sequence` needs, and began with it not long before `step`.

        Who takes several steps for a page has little of each: to wait for it would be slower than to compute it too.
        """
        ordinal = leader.leads
        if self._namer is None or ordinal is None or leader.leads_since_step < step - 1:
            return False
        if ordinal >= sequence.max_cached_tokens // self._page_tokens:
            return False
        return self._names(sequence, ordinal, ordinal + 1, self._namer)[0] == leader.page_names[ordinal]

    def start(self, sequence: Sequence, step: int) -> None:
        """A sequence begins to compute, in step `step`, behind what it took over."""
        sequence.num_noted_tokens = sequence.num_computed_tokens
        self._lead(sequence, sequence.num_computed_tokens // self._page_tokens, step)

    def note(self, sequence: Sequence, step: int) -> None:
        """Step `step` is launched and computes a sequence's tokens: later steps may share those that are known.

        Every rank computes steps in their order, so what this one stores is there when a later one reads it.
        """
        if self._namer is None:
            return
        start = sequence.num_noted_tokens
        if self._publish(sequence, self._namer) and sequence.leads is not None:
            self._lead(sequence, sequence.num_noted_tokens // self._page_tokens, step)
        if start < sequence.num_prompt_tokens <= sequence.num_noted_tokens:
            self._remember_last_page(sequence, self._namer)

    def leave(self, sequence: Sequence) -> None:
        """A sequence is about to give its pages back."""
        self._stop_leading(sequence)
        if self._namer is not None and not sequence.is_withdrawn:
            self._publish(sequence, self._namer)
            self._remember_last_page(sequence, self._namer)

    def withdraw(self, sequence: Sequence) -> None:
        """Let nobody find the pages that a sequence holds, those that it took over included, or is to fill."""
        self._stop_leading(sequence)
        self._allocator.withdraw(sequence.pages)
        sequence.is_withdrawn = True

    def _publish(self, sequence: Sequence, namer: PageNamer) -> bool:
        """Let others share pages that have become full with tokens that are known. Returns whether there are any."""
        first = sequence.num_noted_tokens // self._page_tokens
        sequence.num_noted_tokens = min(sequence.num_computed_tokens, sequence.num_tokens)
        end = sequence.num_noted_tokens // self._page_tokens
        if first == end:
            return False
        parent = self._parent(sequence, first, namer)
        for ordinal, name in enumerate(self._names(sequence, first, end, namer), first):
            tokens = sequence.token_bytes(ordinal * self._page_tokens, (ordinal + 1) * self._page_tokens)
            self._allocator.publish(sequence.pages, ordinal, name)
            self._allocator.remember(sequence.pages, ordinal, parent, tokens)
            parent = name
        return True

    def _lead(self, sequence: Sequence, ordinal: int, step: int) -> None:
        self._stop_leading(sequence)
        if self._namer is not None and ordinal < sequence.num_tokens // self._page_tokens:
            sequence.leads = ordinal
            sequence.leads_since_step = step
            self._leaders.setdefault(self._names(sequence, ordinal, ordinal + 1, self._namer)[0], sequence)

    def _stop_leading(self, sequence: Sequence) -> None:
        if sequence.leads is not None:
            name = sequence.page_names[sequence.leads]
            if self._leaders.get(name) is sequence:
                del self._leaders[name]
            sequence.leads = None

    def _remember_last_page(self, sequence: Sequence, namer: PageNamer) -> None:
        """Let others copy the tokens of the page that is not full yet."""
        ordinal, tokens = divmod(sequence.num_noted_tokens, self._page_tokens)
        if tokens:
            parent = self._parent(sequence, ordinal, namer)
            token_ids = sequence.token_bytes(ordinal * self._page_tokens, sequence.num_noted_tokens)
            self._allocator.remember(sequence.pages, ordinal, parent, token_ids)

    def _parent(self, sequence: Sequence, ordinal: int, namer: PageNamer) -> bytes:
        """What page `ordinal` follows."""
        if ordinal == 0:
            return namer.root(sequence.sampling.cache_salt)
        return self._names(sequence, ordinal - 1, ordinal, namer)[0]

    def _names(self, sequence: Sequence, first: int, end: int, namer: PageNamer) -> list[bytes]:
        """Names of a sequence's full pages with ordinals [first, end)."""
        names = sequence.page_names
        if len(names) < end:
            page_tokens = self._page_tokens
            parent = names[-1] if names else namer.root(sequence.sampling.cache_salt)
            token_ids = sequence.token_bytes(len(names) * page_tokens, end * page_tokens)
            names += namer.names(parent, token_ids, page_tokens * TOKEN_ID_BYTES)
        return names[first:end]


def _common_tokens(one: bytes, other: bytes) -> int:
    """How many tokens (int32) two texts begin with in common."""
    length = min(len(one), len(other))
    difference = int.from_bytes(one[:length], "little") ^ int.from_bytes(other[:length], "little")
    first_bit = (difference & -difference).bit_length() - 1 if difference else 8 * length
    return first_bit // (8 * TOKEN_ID_BYTES)
