"""A server under attack: clients stream, vanish and dawdle while its ranks are killed, stopped and slowed.

Every request must end exactly once, and say what the undisturbed server said.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from live_server import PATIENCE_S, LiveServer

DISCONNECTING, STALLING = 0.2, 0.1
"""Shares of the clients."""
STOPPED_BRIEFLY_S = 0.7
"""How long a slowed rank stands still at a time; far below the step timeout."""


def questions(count: int, vocab_size: int, seed: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths, greedy and seeded in turn."""
    chance = random.Random(seed)
    return [
        {
            "prompt": [chance.randrange(3, vocab_size) for _ in range(chance.choice((1, 7, 40, 150, 400)))],
            "max_tokens": chance.choice((5, 40, 120)),
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            **({"temperature": 0} if number % 2 else {"temperature": 0.9, "top_p": 0.9, "seed": number}),
        }
        for number in range(count)
    ]


@dataclass
class Tally:
    """What became of the requests."""

    finished: int = 0
    left: int = 0
    """By the client."""
    refused: int = 0
    """With 503 and Retry-After."""
    blamed: int = 0
    """With the error for a request that was alone when the engine died a second time: here it was chance."""
    wrong: list[str] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)
    resumed_streams: int = 0
    """Streams that ran over an attack and finished."""


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> list[int]:
    """A whole stream's tokens; every promise about its end is checked."""
    return [token async for token in tokens_of(http, body)]


async def tokens_of(http: httpx.AsyncClient, body: dict[str, Any], *, pause_s: float = 0.0) -> AsyncGenerator[int]:
    reasons: list[str] = []
    done = 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 503:
            assert "retry-after" in response.headers
            raise Refused
        assert response.status_code == 200, response.status_code
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            assert not done, "words after [DONE]"
            if line == "data: [DONE]":
                done += 1
                continue
            content = json.loads(line.removeprefix("data: "))
            if "the engine died twice while it worked on this request" in content.get("error", {}).get("message", ""):
                raise Blamed
            assert "error" not in content, content
            (choice,) = content["choices"]
            if choice["finish_reason"] is not None:
                reasons.append(choice["finish_reason"])
            for token_id in choice["token_ids"]:
                yield token_id
            if pause_s:
                await asyncio.sleep(pause_s)
                pause_s = 0.0
    assert (reasons, done) == (["length"], 1), (reasons, done)


class Refused(Exception):
    """503: the server is not serving now."""


class Blamed(Exception):
    """Three attacks in a row hit this request, the second and the third in its trials, the third with it alone."""


class Chaos:
    """Clients and attacks on a live server, for a while.

    Args:
        bodies, expected: requests, and what an undisturbed server answers.
        attack_every_s: from and to.
    """

    def __init__(
        self,
        server: LiveServer,
        bodies: list[dict[str, Any]],
        expected: list[list[int]],
        *,
        clients: int = 32,
        attack_every_s: tuple[float, float],
        seed: int = 0,
    ) -> None:
        self.server = server
        self.bodies = bodies
        self.expected = expected
        self.clients = clients
        self.attack_every_s = attack_every_s
        self.tally = Tally()
        self._chance = random.Random(seed)
        self._attacked_at = 0.0

    async def run(self, duration_s: float) -> Tally:
        until = time.monotonic() + duration_s
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120, limits=limits) as http:
            attacker = asyncio.create_task(self._attack(http, until))
            await asyncio.gather(*(self._client(http, number, until) for number in range(self.clients)))
            await attacker
            await self._settle(http)
        return self.tally

    async def _client(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            which = chance.randrange(len(self.bodies))
            kind = chance.random()
            began = time.monotonic()
            tokens: list[int] = []
            try:
                if kind < DISCONNECTING:
                    await self._leave_early(http, self.bodies[which], chance)
                    self.tally.left += 1
                    continue
                pause_s = chance.uniform(0.5, 3) if kind < DISCONNECTING + STALLING else 0.0
                async for token in tokens_of(http, self.bodies[which], pause_s=pause_s):
                    tokens.append(token)
            except Refused:
                self.tally.refused += 1
                await asyncio.sleep(0.5)
                continue
            except Blamed:
                self.tally.blamed += 1
                continue
            except Exception as error:
                self.tally.wrong.append(f"request {which}: {type(error).__name__}: {error}")
                continue
            self.tally.finished += 1
            self.tally.resumed_streams += began < self._attacked_at
            if tokens != self.expected[which]:
                self.tally.wrong.append(f"request {which}: {tokens} instead of {self.expected[which]}")

    async def _leave_early(self, http: httpx.AsyncClient, body: dict[str, Any], chance: random.Random) -> None:
        """In the queue, in prefill, between tokens, on the last one: whatever the time brings."""
        patience_s = chance.choice((0.0, 0.02, 0.2, 1.0))
        try:
            async with asyncio.timeout(patience_s):
                await ask(http, body)
        except TimeoutError:
            pass

    async def _attack(self, http: httpx.AsyncClient, until: float) -> None:
        while True:
            pause_s = self._chance.uniform(*self.attack_every_s)
            if time.monotonic() + pause_s > until:
                return
            await asyncio.sleep(pause_s)
            ranks = (await http.get("/health")).json().get("ranks", [])
            if not ranks:
                continue
            rank = self._chance.choice(ranks)
            how = self._chance.choice(("kill", "stop", "slow"))
            if not self.tally.attacks:
                how, rank = "kill", ranks[0]  # the engine, whatever chance says later
            self.tally.attacks.append(f"{how} rank {rank['rank']}")
            self._attacked_at = time.monotonic()
            try:
                if how == "slow":
                    for _ in range(3):
                        os.kill(rank["pid"], signal.SIGSTOP)
                        await asyncio.sleep(STOPPED_BRIEFLY_S)
                        os.kill(rank["pid"], signal.SIGCONT)
                        await asyncio.sleep(0.1)
                else:
                    os.kill(rank["pid"], signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            except ProcessLookupError:
                pass

    async def _settle(self, http: httpx.AsyncClient) -> None:
        """No page is referenced once nobody asks."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                health = (await http.get("/health")).json()
                idle = health.get("state") == "ready" and health["live_requests"] == 0
                if idle and sum(health["pages_used_per_rank"]) == 0:
                    return
                await asyncio.sleep(0.1)


def leftovers(processes: list[psutil.Process], run_dir: str) -> list[str]:
    """What should not be there after the end."""
    left = [f"process {p.pid}" for p in psutil.wait_procs(processes, timeout=PATIENCE_S)[1]]
    return left + ([run_dir] if os.path.exists(run_dir) else [])
