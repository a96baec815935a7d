"""Which full pages can be used again: pages by name, who holds them, and which to forget first. Knows no sequence.

A page's name is a hash of its tokens and of the name of the page before it, so it stands for everything from the first
token on, and for the position. Keys and values depend on nothing else (models for which they do are served without this
cache). Only full pages have names, and a full page is never written again: so no page is written that two sequences
hold. Of each named page one page that follows it is remembered with its tokens, full or not: whoever goes on with some
of them, and then otherwise, writes to a copy.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from secrets import token_bytes

__all__ = ["PageNamer", "PrefixCache"]

_NAME_BYTES = 16


class PageNamer:
    """Names pages under a key of its own, so that nobody outside can prepare two texts with the same name."""

    def __init__(self) -> None:
        key = token_bytes(32)
        self._root = blake2b(digest_size=_NAME_BYTES, key=key, person=b"salt")
        self._page = blake2b(digest_size=_NAME_BYTES, key=key, person=b"page")

    def root(self, salt: str | None) -> bytes:
        """What stands for the parent of a first page. Sequences of different salts share nothing."""
        root = self._root.copy()
        root.update(b"" if salt is None else b"=" + salt.encode())
        return root.digest()

    def names(self, parent: bytes, token_ids: bytes, page_bytes: int) -> list[bytes]:
        """Names of the pages of `token_ids` (int32 bytes, `page_bytes` of them a page) that follow the page `parent`.

        Source: BLAKE2 (RFC 7693), keyed; a name has 128 bits.
        """
        names: list[bytes] = []
        view = memoryview(token_ids)
        for start in range(0, len(token_ids), page_bytes):
            page = self._page.copy()
            page.update(parent)
            page.update(view[start : start + page_bytes])
            parent = page.digest()
            names.append(parent)
        return names


class PrefixCache:
    """Pages of all ranks, each known by one number: page * num_ranks + rank. Operations cost O(1) a page.

    A page is *held* by sequences; without a holder it is *idle* if it has a name or is remembered as what follows one,
    and else of no use any more. Each rank forgets the page first that has been idle longest. Pages of a released
    sequence must come in from its last to its first, so that the end of a prefix goes before its beginning.
    """

    def __init__(self, num_ranks: int, most_pages_of_a_rank: int) -> None:
        self._num_ranks = num_ranks
        self._holders = array("i", bytes(4 * num_ranks * most_pages_of_a_rank))
        self._number_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._following: dict[bytes, tuple[int, bytes]] = {}
        """By the name of a page: a page that follows it, and the tokens that one begins with."""
        self._parent_of: dict[int, bytes] = {}
        """Of the pages in there."""
        self._idle: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in range(num_ranks))
        """By rank, the page that has been idle longest first."""

    def find(self, names: list[bytes]) -> list[int]:
        """The pages that have these names, up to the first name that no page has."""
        numbers: list[int] = []
        number_of = self._number_of
        for name in names:
            if name not in number_of:
                break
            numbers.append(number_of[name])
        return numbers

    def count_idle(self, numbers: list[int]) -> int:
        """How many of these pages, each with a name, have no holder."""
        holders = self._holders
        return sum(not holders[number] for number in numbers)

    def count_held_once(self, numbers: Iterable[int]) -> int:
        """How many of these pages have one holder."""
        holders = self._holders
        return sum(holders[number] == 1 for number in numbers)

    def num_idle(self, rank: int) -> int:
        return len(self._idle[rank])

    def hold_new(self, number: int) -> None:
        """A sequence is about to fill a page that was of no use to anybody."""
        self._holders[number] = 1

    def hold(self, numbers: list[int]) -> int:
        """One more sequence uses these pages, which `find` gave. Returns how many of them were idle."""
        num_held = 0
        for number in numbers:
            if not self._holders[number]:
                del self._idle[number % self._num_ranks][number]
                num_held += 1
            self._holders[number] += 1
        return num_held

    def let_go(self, number: int) -> tuple[bool, bool]:
        """One sequence fewer uses the page. Returns whether that was the last, and whether the page is idle now."""
        self._holders[number] -= 1
        if self._holders[number]:
            return False, False
        if number not in self._name_of and number not in self._parent_of:
            return True, False
        self._idle[number % self._num_ranks][number] = None
        return True, True

    def publish(self, name: bytes, number: int) -> int | None:
        """A held page is full and computed: it may be found from now on.

        Returns an idle page that had the name until now and is of no use any more. When the page that has it is held,
        `number` stays without a name.
        """
        other = self._number_of.get(name)
        if other is not None:
            if self._holders[other]:
                return None
            del self._idle[other % self._num_ranks][other]
            self._strike_out(other)
        self._number_of[name] = number
        self._name_of[number] = name
        return other

    def following(self, parent: bytes) -> tuple[int, bytes] | None:
        """A page that follows the page with the name `parent`, and the tokens (int32 bytes) that it begins with."""
        return self._following.get(parent)

    def remember(self, parent: bytes, number: int, token_ids: bytes) -> int | None:
        """A held page follows the page with the name `parent`, and begins with these tokens, which are computed.

        One page is remembered for each parent: the newest, unless the one before begins with the same tokens. Returns
        an idle page that is of no use any more.
        """
        replaced = None
        before = self._following.get(parent)
        if before is not None and before[0] != number:
            if before[1].startswith(token_ids):
                return None
            del self._parent_of[before[0]]
            if not self._holders[before[0]] and before[0] not in self._name_of:
                replaced = before[0]
                del self._idle[replaced % self._num_ranks][replaced]
        self._following[parent] = (number, token_ids)
        self._parent_of[number] = parent
        return replaced

    def withdraw(self, numbers: Iterable[int]) -> None:
        """These pages, which are held, may be wrong: they are not found any more."""
        for number in numbers:
            self._strike_out(number)

    def forget(self, rank: int) -> int:
        """Forget the page of a rank that has been idle longest. Returns it."""
        number, _ = self._idle[rank].popitem(last=False)
        self._strike_out(number)
        return number

    def _strike_out(self, number: int) -> None:
        """A page is found no more, under its name or as what follows another."""
        name = self._name_of.pop(number, None)
        if name is not None:
            del self._number_of[name]
        parent = self._parent_of.pop(number, None)
        if parent is not None:
            del self._following[parent]
