"""A rank's watch over itself and its neighbours, from a thread of its own: it lives, or it is made to end.

A rank that stops making progress ends all the others' progress too, and nobody notices: collectives wait. So every rank
counts how long its step has taken. Beyond the limit it writes down where everybody stands, kills neighbours that
are stopped (torchrun would wait half a minute for each), and ends; torchrun then starts all of them again.

The step itself pays a few stores of attributes for this.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from leanserve.contracts.messages import FromRank, Pulse, RankFailed, encode
from leanserve.launch.lifeline import is_alive, is_stopped
from leanserve.launch.meeting import Card

__all__ = ["EXIT_STUCK", "StepWatch", "dump_stacks_when_asked"]

logger = logging.getLogger("leanserve.launch")

EXIT_STUCK = 70
PULSE_S = 0.5
IDLE_GRACE_S = 5.0
"""Rank 0 says something every few seconds; beyond the limit and this, a rank without work takes it for dead."""
STACKS_S = 0.3
"""For neighbours to write their stacks."""

DUMP_SIGNAL = signal.SIGUSR1


def dump_stacks_when_asked() -> None:
    """From now on this process answers DUMP_SIGNAL with the stacks of all its threads, whatever it is doing."""
    faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True)


class StepWatch:
    """Tell it when a step begins and ends.

    Args:
        cards: of all ranks, by rank.
        stacks_claim: a file that the first rank of a machine to run out of patience creates, and asks for all stacks.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        rank: int,
        cards: list[Card],
        *,
        pulse_address: str,
        step_timeout_s: float,
        stacks_claim: Path,
    ) -> None:
        self._context = context
        self._card = cards[rank]
        self._neighbours = [
            card
            for card in cards
            if (card.host, card.agent_pid) == (self._card.host, self._card.agent_pid) and card.rank != rank
        ]
        self._pulse_address = pulse_address
        self._limit_s = step_timeout_s
        self._stacks_claim = stacks_claim
        self._step = 0
        self._num_running = 0
        """Steps that have begun and not ended."""
        self._began_at: float | None = None
        self._ended_at: float | None = None
        """None while loading, which may take as long as it takes."""
        self._last_words: RankFailed | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self) -> None:
        """A step begins, or will when the one before it ends."""
        self._num_running += 1
        if self._num_running == 1:
            self._began_at = time.monotonic()

    def end(self, step: int | None = None) -> None:
        """The oldest is complete; `step` is its number if it has one. Also says that the rank is loaded."""
        if step is not None:
            self._step = step
        self._num_running -= 1
        self._ended_at = time.monotonic()
        self._began_at = self._ended_at if self._num_running else None

    def lost_neighbours(self) -> list[int]:
        """Ranks of this machine whose processes are gone."""
        return [card.rank for card in self._neighbours if not is_alive(card.pid)]

    def close(self, last_words: str | None = None, *, is_final: bool = False) -> None:
        """The watch is over; `last_words` say why the rank failed, if it did."""
        if last_words is not None:
            self._last_words = RankFailed(self._card.rank, last_words, is_final)
        self._is_over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 100)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(self._pulse_address)

        def tell(message: FromRank) -> None:
            with contextlib.suppress(zmq.Again):  # nobody listens, or nobody reads
                socket.send(encode(message), zmq.NOBLOCK)

        try:
            while not self._is_over.wait(PULSE_S):
                # Should this thread never run again (a call that keeps the GIL), this ends the process all the same.
                faulthandler.dump_traceback_later(2 * self._limit_s + 5 * PULSE_S, exit=True, file=sys.stderr)
                now = time.monotonic()
                began_at, ended_at = self._began_at, self._ended_at
                busy_s = 0.0 if began_at is None else now - began_at
                card = self._card
                tell(Pulse(card.rank, card.pid, card.host, self._step, busy_s))
                if busy_s > self._limit_s:
                    self._give_up(f"the step after {self._step} has taken {busy_s:.1f} s", tell)
                elif began_at is None and ended_at is not None and now - ended_at > self._limit_s + IDLE_GRACE_S:
                    self._give_up(f"rank 0 has said nothing for {now - ended_at:.1f} s", tell)
            if self._last_words is not None:
                tell(self._last_words)
        finally:
            socket.close()

    def _give_up(self, what: str, tell: Callable[[FromRank], None]) -> None:
        stopped = [card for card in self._neighbours if is_stopped(card.pid)]
        message = f"{what}; the limit is {self._limit_s:g} s (--step-timeout)"
        if stopped:
            named = ", ".join(f"rank {card.rank} (pid {card.pid})" for card in stopped)
            message += f"; stopped, and killed now: {named}"
        tell(RankFailed(self._card.rank, message))
        extra = {"event": "rank_stuck", "stopped_ranks": [card.rank for card in stopped]}
        logger.error("rank %d gives up and ends: %s; its stacks follow", self._card.rank, message, extra=extra)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self._is_first_to_give_up():
            for card in self._neighbours:
                if card not in stopped:
                    _signal(card.pid, DUMP_SIGNAL)
        time.sleep(STACKS_S)
        for card in stopped:
            _signal(card.pid, signal.SIGKILL)
        os._exit(EXIT_STUCK)

    def _is_first_to_give_up(self) -> bool:
        try:
            self._stacks_claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            pass
        return True


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # whoever signals goes on, and ends
        os.kill(pid, number)
