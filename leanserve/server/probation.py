"""Which of the requests that outlived an engine the next one gets, and when; and which one an engine died of. Knows
who was at the engine and how far each came; neither what ended the engine nor how to reach the next."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from leanserve.server.live_requests import LiveRequest
from leanserve.server.output_stream import OutputStream

__all__ = ["Probation", "Suspect"]

_TOKENS_TO_PASS = 2
"""The first comes with the last step of the prefill, the second out of a decode step. Where steps overlap, it also says
that the step is done which an engine may have died in without telling the token before."""


@dataclass(eq=False)
class Suspect:
    """The requests of one stream that an engine had when it died: they end together, so they are tried together."""

    requests: list[LiveRequest]
    failed_trials: int = 0
    """Engines that died during its trial."""

    @property
    def has_passed(self) -> bool:
        return all(request.tokens_of_engine >= _TOKENS_TO_PASS for request in self.live)

    @property
    def live(self) -> list[LiveRequest]:
        return [request for request in self.requests if not request.has_ended]

    @property
    def num_tokens(self) -> int:
        """To be computed again."""
        return sum(request.times.prompt_tokens + len(request.output_token_ids) for request in self.live)


class Probation:
    """An engine may have died of any request that it had. So the next one gets these suspects in turn, the shortest
    first: a trial lasts until each of the suspect's requests has had two more tokens, or has ended. To compute them all
    again takes as many tokens in turn as at once. Who has passed runs on meanwhile, and newcomers are let in: a long
    trial holds up none but longer suspects.

    If the engine dies during a trial, that may still be chance, or the doing of somebody beside the suspect. So it has
    a second trial, first at the next engine and alone there. If that engine dies too, the suspect is to blame. A deadly
    request thus costs three engines; an innocent one is blamed only if the second and the third die of what is no
    request's doing, each just during its trial.
    """

    def __init__(self) -> None:
        self._suspects: deque[Suspect] = deque()
        """Still to be tried by the present engine, in their order."""
        self._on_trial: Suspect | None = None
        self._newcomers: list[LiveRequest] = []
        """Who came while nobody was let in."""

    @property
    def is_over(self) -> bool:
        """Nobody waits for anybody."""
        return self._on_trial is None and not self._suspects and not self._newcomers

    @property
    def lets_in(self) -> bool:
        """Whether the engine may have newcomers: not while a suspect is tried alone."""
        return self._on_trial is None or self._on_trial.failed_trials == 0

    def hold(self, newcomer: LiveRequest) -> None:
        """It waits until somebody is let in again."""
        self._newcomers.append(newcomer)

    def engine_lost(self, lost: Iterable[LiveRequest]) -> Suspect | None:
        """The engine died, and had the requests `lost`. Returns whose trial that was, if there is one."""
        tried, self._on_trial = self._on_trial, None
        suspects = list(self._suspects)
        if tried is not None and not tried.has_passed:
            tried.failed_trials += 1
            suspects.append(tried)
        else:
            tried = None
        known = {request for suspect in suspects for request in suspect.requests}
        by_stream: dict[OutputStream, list[LiveRequest]] = {}
        for request in lost:
            if request not in known:
                by_stream.setdefault(request.stream, []).append(request)
        suspects += map(Suspect, by_stream.values())
        self._suspects = deque(sorted(suspects, key=lambda suspect: (-suspect.failed_trials, suspect.num_tokens)))
        return tried

    def next(self) -> list[LiveRequest]:
        """Who goes to the engine now: asked when it is ready, and after whatever may have ended a trial."""
        if self._on_trial is not None and not self._on_trial.has_passed:
            return []
        self._on_trial = None
        while self._suspects and self._on_trial is None:
            suspect = self._suspects.popleft()
            self._on_trial = suspect if suspect.live else None
        going = [] if self._on_trial is None else self._on_trial.live
        if self.lets_in:
            newcomers, self._newcomers = self._newcomers, []
            going += [request for request in newcomers if not request.has_ended]
        return going
