"""Who waits, and in what order. Knows no pages and no budget."""

from bisect import bisect_left, insort
from collections.abc import Callable

from leanserve.engine.sequence import Sequence

__all__ = ["WaitingQueue"]


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order


class WaitingQueue:
    """Waiting sequences in their order, and beside them those set aside: *followers*, whose next page another sequence
    computes right now.

    A follower holds nothing and nobody waits for it. It stays aside while its leader, always one that comes before it,
    is computing what both begin with. So every chain of followers ends at a sequence that waits for nobody.
    """

    def __init__(self) -> None:
        self._queue: list[Sequence] = []
        self._followers: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._queue) + len(self._followers)

    @property
    def head(self) -> Sequence | None:
        """Who is next; None when nobody waits but followers."""
        return self._queue[0] if self._queue else None

    def add(self, sequence: Sequence) -> None:
        insort(self._queue, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        if sequence.leader is not None:
            self._followers.remove(sequence)
            sequence.leader = None
        else:
            del self._queue[bisect_left(self._queue, sequence.order, key=_order)]

    def set_aside(self, leader: Sequence) -> None:
        """The head follows `leader` from now on."""
        follower = self._queue.pop(0)
        follower.leader = leader
        self._followers.append(follower)

    def rejoin(self, stays: Callable[[Sequence, Sequence], bool]) -> None:
        """Queue the followers for which `stays(follower, leader)` is false."""
        staying: list[Sequence] = []
        for follower in self._followers:
            assert follower.leader is not None
            if stays(follower, follower.leader):
                staying.append(follower)
            else:
                follower.leader = None
                self.add(follower)
        self._followers = staying
