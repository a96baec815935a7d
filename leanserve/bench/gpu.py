"""`bench gpu`: decode steps on one GPU, with and without CUDA graphs, overlapping steps and fused kernels, and what
must be the same."""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zmq
from rich.console import Console

from leanserve.bench.floor import decode_read_bytes
from leanserve.bench.gpu_report import Check, GpuCell, GpuReport, StepFigures
from leanserve.bench.leanserve_ranks import PAGE_TOKENS, engine_on_filled_cache
from leanserve.bench.machine import describe_machine, gpu_read_bandwidth, read_bandwidth
from leanserve.bench.noise import fill_with_noise, random_prompts
from leanserve.bench.random_model import ONE_BILLION, TINY, make_checkpoint
from leanserve.bench.task import MAX_STEPS, StepClock
from leanserve.contracts.config import BatchOptions, CacheOptions, EngineConfig
from leanserve.contracts.errors import ConfigError
from leanserve.contracts.messages import StepReport, Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.channel import StepSender
from leanserve.engine.engine import Engine
from leanserve.launch.loading import LoadedRank, load_rank
from leanserve.launch.place import Place
from leanserve.llm import LLM
from leanserve.model.architecture import Architecture
from leanserve.worker.device import describe, usable_gpus
from leanserve.worker.runner import Runner

__all__ = ["run_gpu_bench"]

CELLS = ((1024, 1), (1024, 32), (32768, 1), (32768, 8), (131072, 1))
"""(context tokens, batch)."""
TINY_CELLS = ((64, 1), (64, 3))
PROMPTS = (
    "Monday, 3 March. We sailed east under a bright sky.",
    "The brass key is in locker 4821. Question: Where is the brass key?\nAnswer:",
    "The captain said " * 40,
)
"""For the ranks that share a GPU: the bundled model's own world."""


@dataclass(frozen=True)
class _Mode:
    """How a step is launched."""

    name: str
    eager: bool
    fused: bool


MODES = (
    _Mode("graphs", eager=False, fused=True),
    _Mode("unfused", eager=False, fused=False),
    _Mode("eager", eager=True, fused=True),
)


@dataclass(frozen=True)
class _Bench:
    """What is measured, and where."""

    device: torch.device
    dtype: torch.dtype
    cells: tuple[tuple[int, int], ...]
    model_dir: Path
    architecture: Architecture
    folder: Path

    def config(self, mode: _Mode) -> EngineConfig:
        """Pools that hold the largest cell."""
        pages = max(batch * (-(-(context + MAX_STEPS + 2) // PAGE_TOKENS)) for context, batch in self.cells)
        page_bytes = self.architecture.kv_bytes_per_token(self.dtype.itemsize) * PAGE_TOKENS
        return EngineConfig(
            model_dir=str(self.model_dir),
            dtype="bfloat16" if self.dtype == torch.bfloat16 else "float32",
            device="cuda" if self.device.type == "cuda" else "cpu",
            enforce_eager=mode.eager,
            fused_kernels=mode.fused,
            cache=CacheOptions(page_tokens=PAGE_TOKENS, kv_memory_bytes=pages * page_bytes),
            batch=BatchOptions(max_sequences=max(batch for _, batch in self.cells)),
        )


class _Budget:
    """What is left out because the time is over."""

    def __init__(self, budget_s: float | None) -> None:
        self._began = time.perf_counter()
        self._budget_s = budget_s
        self.left_out: list[str] = []

    @property
    def spent_s(self) -> float:
        return time.perf_counter() - self._began

    def allows(self, what: str) -> bool:
        """Whether `what` may still begin; if not, that is noted."""
        if self._budget_s is None or self.spent_s <= self._budget_s:
            return True
        self.left_out.append(what)
        return False


def run_gpu_bench(
    rank_counts: tuple[int, ...],
    console: Console,
    *,
    tiny: bool,
    budget_s: float | None = None,
    save: Callable[[GpuReport], None] = lambda report: None,
) -> GpuReport:
    """Measure every cell and do every check, saying on `console` what comes next.

    Args:
        rank_counts: that must give the same tokens; none leaves this check out.
        budget_s: what would begin later is left out; None: nothing is.
        save: gets what was found so far, again and again.

    Raises:
        ConfigError: there is no usable GPU, and the model is not the tiny one.
    """
    budget = _Budget(budget_s)
    gpus = usable_gpus()
    if gpus.count == 0 and not tiny:
        raise ConfigError(f"bench gpu needs a GPU: {gpus.reason}; --tiny tries the command on the CPU")
    device = torch.device("cuda", 0) if gpus.count else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, cells = (TINY, TINY_CELLS) if tiny else (ONE_BILLION, CELLS)
    read_bytes_per_s = gpu_read_bandwidth(device) if device.type == "cuda" else read_bandwidth()
    checks: list[Check] = []
    figures: dict[str, list[StepFigures]] = {}
    capture_s = None
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="leanserve-bench-") as folder:
        model_dir = Path(folder) / "model"
        model_dir.mkdir()
        console.print("writing a random model")
        architecture = make_checkpoint(shape, model_dir, dtype=dtype, device=device)
        bench = _Bench(device, dtype, cells, model_dir, architecture, Path(folder))

        def so_far() -> GpuReport:
            return GpuReport(
                benchmark="gpu",
                machine=msgspec.structs.replace(machine, versions=machine.versions | _gpu_versions()),
                device=describe(device),
                model=shape,
                dtype=str(dtype).removeprefix("torch."),
                read_bytes_per_s=round(read_bytes_per_s),
                capture_s=capture_s,
                checks=checks,
                cells=[
                    GpuCell(
                        context_tokens=context,
                        batch=batch,
                        read_bytes=(read_bytes := decode_read_bytes(architecture, dtype.itemsize, context, batch)),
                        read_ms=round(read_bytes / read_bytes_per_s * 1e3, 4),
                        figures={mode: found[index] for mode, found in figures.items() if index < len(found)},
                    )
                    for index, (context, batch) in enumerate(cells)
                ],
                left_out=budget.left_out,
                seconds=round(budget.spent_s, 1),
            )

        for mode in MODES:
            if (mode.eager or device.type == "cuda") and budget.allows(f"decode, {mode.name}"):
                console.print(f"decode, {mode.name}")
                figures[mode.name], captured = _decode(bench, checks, budget, mode)
                capture_s = capture_s or captured
                gc.collect()  # graphs and runner hold on to each other, and to the pool
                torch.cuda.empty_cache()
                save(so_far())
    if rank_counts:
        checks += _same_tokens(rank_counts, device, console, budget)
    save(so_far())
    return so_far()


def _decode(bench: _Bench, checks: list[Check], budget: _Budget, mode: _Mode) -> tuple[list[StepFigures], float | None]:
    """Every cell on one loaded model, and the seconds that capturing took. Where there are graphs, they are checked."""
    config = bench.config(mode)
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=os.getpid())
    began: list[float] = []
    loaded = load_rank(
        place,
        dist.HashStore(),
        config,
        lambda done, total: None,
        lambda done, total: began.append(time.perf_counter()),
    )
    fill_with_noise(loaded.shard.pool_L2PKTD)
    figures = []
    with zmq.Context() as context:
        sender = StepSender(context, bench.folder, num_ranks=1)
        engine = engine_on_filled_cache(loaded, config, sender)
        for number, (context_tokens, batch) in enumerate(bench.cells):
            # The longest come last: where one has no time, those after it have none either.
            if not budget.allows(f"{batch} x {context_tokens:,}, {mode.name}"):
                continue
            figures.append(_measure(engine, loaded, context_tokens, batch, seed=number))
            if loaded.runner.graphs is not None:
                checks.append(_same_bits(loaded.runner, context_tokens, batch, mode))
            _end_all(engine, batch)
        sender.close()
    return figures, round(began[-1] - began[0], 1) if began else None


def _measure(engine: Engine, loaded: LoadedRank, context_tokens: int, batch: int, *, seed: int) -> StepFigures:
    sampling = SamplingParams(temperature=0, max_tokens=MAX_STEPS + 2, ignore_eos=True)
    for index, prompt in enumerate(random_prompts(batch, context_tokens, loaded.info.vocab_size, seed=seed)):
        engine.submit(Submit(str(index), prompt.numpy().tobytes(), sampling))
    engine.step()  # admits them; in the eager mode it compiles as well
    clock, reports = StepClock(), list[StepReport]()
    enough = False
    while not enough:
        report = engine.report(engine.step()).step_report
        enough = clock.tick()
        assert report is not None
        reports.append(report)
    timing = clock.timing()

    def median_ms(seconds: list[float]) -> float:
        return round(statistics.median(seconds) * 1e3, 4)

    return StepFigures(
        step_ms=round(timing.seconds * 1e3, 4),
        forward_ms=median_ms([report.times.forward_s for report in reports[1:]]),
        sample_ms=median_ms([report.times.sample_s for report in reports[1:]]),
        schedule_ms=median_ms([report.schedule_s for report in reports[1:]]),
        tokens_per_s=round(batch / timing.seconds, 2),
        steps=timing.samples,
    )


def _same_bits(runner: Runner, context_tokens: int, batch: int, mode: _Mode) -> Check:
    """The step that comes next, replayed and launched anew at the same size."""
    graphs = runner.graphs
    assert graphs is not None
    eager = runner.decode_eagerly(min(size for size in graphs.sizes if size >= batch))
    with torch.inference_mode():
        replayed = graphs(batch)
    assert eager is not None
    assert replayed is not None
    different = int((eager[:batch] != replayed).sum())
    return Check(
        f"replay equals eager bit for bit, {batch} x {context_tokens:,}{'' if mode.fused else ', unfused'}",
        passed=different == 0,
        seen=f"{different} of {replayed.numel():,} logits differ",
    )


def _end_all(engine: Engine, batch: int) -> None:
    for index in range(batch):
        engine.abort(str(index))
    while engine.has_work:
        engine.step()


def _same_tokens(rank_counts: tuple[int, ...], device: torch.device, console: Console, budget: _Budget) -> list[Check]:
    """The bundled model in float32, greedy: on any number of ranks that share the device, eagerly and not."""
    greedy = SamplingParams(temperature=0, max_tokens=24)
    graphs = device.type == "cuda"
    runs = [(count, eager) for count in rank_counts for eager in (False, True) if eager or (graphs and count == 1)]
    answers: dict[str, list[list[int]]] = {}
    for count, eager in runs:
        name = f"{count} rank{'s' if count > 1 else ''}{' eager' if eager else ''}"
        if not budget.allows(f"tokens on {name}"):
            continue
        console.print(f"tokens on {name}")
        with LLM(
            ranks=count, device=device.type, comm="gloo", dtype="float32", enforce_eager=eager, kv_memory="256MiB"
        ) as llm:
            results = llm.generate(list(PROMPTS), greedy, use_tqdm=False)
        answers[name] = [result.outputs[0].token_ids for result in results]
    if len(answers) < 2:
        return []  # nothing to compare, for want of time
    first, *others = answers
    different = [name for name in others if answers[name] != answers[first]]
    seen = f"{', '.join(different)} differ from {first}" if different else "all equal"
    return [Check(f"the same tokens in float32 on {', '.join(answers)}", passed=not different, seen=seen)]


def _gpu_versions() -> dict[str, str]:
    found = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    with suppress(PackageNotFoundError):  # not on every platform
        found["triton"] = version("triton")
    return found
