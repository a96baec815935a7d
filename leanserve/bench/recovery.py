"""How long a stream stands still when a rank fails: from the signal to the first token after it.

Real processes and the whole way but HTTP. Tokens that were under way when the signal was sent do not count: the first
one that a new engine gave does.
"""

import asyncio
import os
import signal
import statistics
import time
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanserve.bench.machine import Machine, describe_machine, load_average
from leanserve.contracts.config import EngineConfig
from leanserve.contracts.errors import EngineError
from leanserve.contracts.sampling import SamplingParams
from leanserve.launch.engine_group import EngineGroup, Recovery
from leanserve.launch.options import LaunchOptions
from leanserve.launch.run_dir import make_run_dir

__all__ = ["Attack", "RecoveryReport", "run_recovery_bench"]

KILL_TARGET_S = 10.0
STOP_TARGET_S = 10.0
"""Beyond the step timeout."""
PROMPT_TOKENS, MAX_TOKENS, TOKENS_BEFORE = 64, 20_000, 20
PULSES_S = 1.5
"""For every rank to have told its process id."""


class Attack(msgspec.Struct, frozen=True):
    """What is done to one rank of a running group."""

    name: str
    signal_number: int
    rank: int
    target_s: float


class Outcome(msgspec.Struct, frozen=True):
    """The times of one attack, of all its runs."""

    attack: Attack
    seconds: list[float]
    """From the signal to the first resumed token."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench recovery` found."""

    machine: Machine
    model: str
    ranks: int
    step_timeout_s: float
    outcomes: list[Outcome]


def attacks(ranks: int, step_timeout_s: float) -> list[Attack]:
    """SIGKILL and SIGSTOP, on the rank with the engine and on the last one."""
    found: list[Attack] = []
    for name, number, target_s in (
        ("SIGKILL", signal.SIGKILL, KILL_TARGET_S),
        ("SIGSTOP", signal.SIGSTOP, step_timeout_s + STOP_TARGET_S),
    ):
        for rank in dict.fromkeys((0, ranks - 1)):
            found.append(Attack(f"{name} of rank {rank}", number, rank, target_s))
    return found


def run_recovery_bench(
    *, model: str | None, ranks: int, step_timeout_s: float, runs: int, out: Path | None
) -> RecoveryReport:
    """Measure every attack `runs` times on one group, print a table, and write `recovery.json` to `out`."""
    options = LaunchOptions(model=model, ranks=ranks, device="cpu", kv_memory="64MiB", step_timeout_s=step_timeout_s)
    machine = describe_machine()
    config = options.engine_config(options.find_model())
    console = Console(stderr=True)
    outcomes = asyncio.run(_measure(config, ranks, attacks(ranks, step_timeout_s), runs, console))
    report = RecoveryReport(
        machine=machine,
        model=options.model or "bundled",
        ranks=ranks,
        step_timeout_s=step_timeout_s,
        outcomes=outcomes,
    )
    if out is not None:
        (out / "recovery.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    _print(report, Console())
    return report


async def _measure(config: EngineConfig, ranks: int, todo: list[Attack], runs: int, console: Console) -> list[Outcome]:
    group = EngineGroup(
        config,
        num_ranks=ranks,
        run_dir=make_run_dir(),
        recovery=Recovery(max_restarts=len(todo) * runs),
    )
    try:
        await group.start()
        info = await group.wait_ready()
        prompt = [7 * place % info.vocab_size for place in range(PROMPT_TOKENS)]
        outcomes: list[Outcome] = []
        for attack in todo:
            seconds = []
            for run in range(runs):
                seconds.append(await _attack(group, attack, prompt))
                console.print(f"{attack.name}, run {run + 1}: {seconds[-1]:.2f} s (load {load_average()})")
            outcomes.append(Outcome(attack, seconds))
        return outcomes
    finally:
        await group.close()


async def _attack(group: EngineGroup, attack: Attack, prompt: list[int]) -> float:
    client = group.client
    outputs = client.generate(prompt, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, seed=1))
    before = 0
    struck_at: float | None = None
    attempt = client.engine.attempt
    ready_for_it = time.monotonic() + PULSES_S
    try:
        async for _ in outputs:
            now = time.monotonic()
            before += 1
            if struck_at is None:
                if before >= TOKENS_BEFORE and now >= ready_for_it:
                    os.kill(client.health.ranks[attack.rank].pulse.pid, attack.signal_number)
                    struck_at = now
            elif client.engine.attempt > attempt:
                return now - struck_at
    finally:
        await outputs.aclose()
    raise EngineError(f"{attack.name}: the request ended before the ranks were started again")


def _print(report: RecoveryReport, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("attack", "median", "worst", "target"):
        table.add_column(heading, justify="left" if heading == "attack" else "right")
    for outcome in report.outcomes:
        met = "met" if max(outcome.seconds) < outcome.attack.target_s else "missed"
        table.add_row(
            outcome.attack.name,
            f"{outcome.median_s:.2f} s",
            f"{max(outcome.seconds):.2f} s",
            f"{outcome.attack.target_s:g} s, {met}",
        )
    console.print(f"From the signal to the first resumed token; {report.ranks} ranks, model {report.model}")
    console.print(f"{report.machine.cpu}, {report.machine.cores} cores, step timeout {report.step_timeout_s:g} s")
    console.print(table)
