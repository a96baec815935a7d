"""Ranks as processes that met by file, the engine on rank 0, no HTTP: what the exactness tests drive."""

import math
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zmq

from leanserve.attention.step import StepAttention
from leanserve.contracts.batch import Stop
from leanserve.contracts.config import BatchOptions, CacheOptions, EngineConfig
from leanserve.contracts.messages import StepReport, Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.channel import StepReceiver, StepSender
from leanserve.distributed.ranks import Ranks
from leanserve.launch.all_ranks import follow, make_engine
from leanserve.launch.loading import LoadedRank, load_rank
from leanserve.launch.place import Place
from leanserve.model.architecture import read_architecture
from leanserve.model.decoder import Decoder
from warm_start import warm_start_method


@dataclass(frozen=True)
class Case:
    """Prompts for one model on a group of ranks."""

    model_dir: Path
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    at_once: bool = True
    """All prompts together, or one after the other."""
    pages_per_rank: int = 400
    page_tokens: int = 16
    max_batch_tokens: int = 256
    max_prefill_step_tokens: int | None = None
    """However long such a step takes here: which steps there are does not depend on the machine."""
    prefix_cache: bool = True
    device: str = "cpu"
    """cuda: all ranks on one GPU, through Gloo."""
    attention: str = "auto"
    weights: str = "auto"
    overlap: bool = False
    """Launch each step before the one before it is collected, as on a GPU."""
    abort_after: int | None = None
    """Every third prompt is aborted when it has given so many tokens, with a step in flight where steps overlap."""
    seeds: Sequence[int] = ()
    """One for each prompt, if any, in place of the sampling's own."""
    counts_traffic: bool = False
    broken_page: tuple[int, int] | None = None
    """(rank, page) that is overwritten once every prompt has given a token: the outputs must change."""
    keep_logits: bool = False
    generated: Sequence[Sequence[int]] = ()
    """By prompt: what another engine generated already; empty: nothing."""

    def config(self) -> EngineConfig:
        token_bytes_of_kv = read_architecture(self.model_dir).kv_bytes_per_token(torch.float32.itemsize)
        return EngineConfig(
            model_dir=str(self.model_dir),
            dtype="float32",
            device=self.device,  # type: ignore[arg-type]
            comm="gloo",
            attention=self.attention,  # type: ignore[arg-type]
            weights=self.weights,  # type: ignore[arg-type]
            cache=CacheOptions(
                page_tokens=self.page_tokens,
                kv_memory_bytes=self.pages_per_rank * self.page_tokens * token_bytes_of_kv,
                prefix_cache=self.prefix_cache,
            ),
            batch=BatchOptions(
                max_batch_tokens=self.max_batch_tokens, max_prefill_step_tokens=self.max_prefill_step_tokens
            ),
        )


@dataclass
class StepTraffic:
    """What one rank did in one step."""

    tokens: int
    """Whose hidden states it computed."""
    bytes_sent: int
    """To all ranks together, from within attention."""


@dataclass
class Answer:
    """What a case gave."""

    token_ids: list[list[int]]
    """By prompt."""
    finish_reasons: list[str]
    preemptions: int
    pages_left: int
    """Pages in use when every request had ended."""
    cached_tokens: list[int]
    """By prompt: tokens that were in the prefix cache."""
    step_reports: list[StepReport] = field(default_factory=list)
    num_ahead: int = 0
    """How many steps were in flight when the engine had done another."""
    traffic: list[list[StepTraffic]] = field(default_factory=list)
    """With counts_traffic: of each rank, its steps that computed something."""
    logprobs: list[list[tuple[float, int, list[tuple[int, float]]]]] = field(default_factory=list)
    """By prompt, of each token, where `logprobs` is asked for: its own, its rank, the most likely (id, logprob)s."""
    prompt_logprobs: list[list[tuple[float, int, list[tuple[int, float]]]]] = field(default_factory=list)
    """By prompt, of its tokens from the second on, where `prompt_logprobs` is asked for."""
    rows_logits: list[list[list[float]]] = field(default_factory=list)
    """With keep_logits: each step's logits [M, V] of rank 0."""


def run_cases(num_ranks: int, cases: Sequence[Case]) -> list[Answer]:
    """Serve the cases in turn on one group of ranks; one rank runs in this very process."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        if num_ranks == 1:
            return _with_traffic(_serve_cases(0, 1, cases, Path(folder)), 1, cases, Path(folder))
        # What Triton does is decided when it is imported.
        anew = any(case.device != "cpu" or case.attention == "triton" for case in cases)
        context = mp.get_context("spawn" if anew else warm_start_method())
        ranks = [
            context.Process(target=_run, args=(rank, num_ranks, cases, Path(folder)), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(240)
        codes = [process.exitcode for process in ranks]
        assert codes == [0] * num_ranks, f"exit codes of the ranks: {codes}"
        answers = msgspec.json.decode((Path(folder) / "answers").read_bytes(), type=list[Answer])
        return _with_traffic(answers, num_ranks, cases, Path(folder))


def _with_traffic(answers: list[Answer], num_ranks: int, cases: Sequence[Case], folder: Path) -> list[Answer]:
    for number, case in enumerate(cases):
        if case.counts_traffic:
            files = [folder / str(number) / f"traffic-{rank}" for rank in range(num_ranks)]
            answers[number].traffic = [msgspec.json.decode(f.read_bytes(), type=list[StepTraffic]) for f in files]
    return answers


def _run(rank: int, size: int, cases: Sequence[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    answers = _serve_cases(rank, size, cases, folder)
    if rank == 0:
        (folder / "answers").write_bytes(msgspec.json.encode(answers))


def _serve_cases(rank: int, size: int, cases: Sequence[Case], folder: Path) -> list[Answer]:
    store = dist.FileStore(str(folder / "store"), size)
    answers = []
    for number, case in enumerate(cases):
        place = Place(rank=rank, size=size, local_rank=rank, local_size=size, agent_pid=0)
        config = case.config()
        loaded = load_rank(place, dist.PrefixStore(str(number), store), config, lambda done, total: None)
        run_dir = folder / str(number)
        run_dir.mkdir(exist_ok=True)
        if case.broken_page is not None and case.broken_page[0] == rank:
            _break_page(loaded, case)
        with (
            zmq.Context() as context,
            _counted_traffic(case, run_dir / f"traffic-{rank}"),
            patch("leanserve.engine.step_budget.PREFILL_STEP_S", math.inf),
        ):
            if rank == 0:
                sender = StepSender(context, run_dir, size)
                answers.append(_answer(loaded, case, config, sender))
                sender.send(Stop())
                loaded.leave()
                sender.close()
            else:
                follow(loaded, StepReceiver(context, run_dir, rank))
                loaded.leave()
    return answers


def _answer(loaded: LoadedRank, case: Case, config: EngineConfig, sender: StepSender) -> Answer:
    kept: list[list[list[float]]] = []
    if case.keep_logits:
        logits_of = loaded.decoder.logits

        def keep(hidden: torch.Tensor) -> torch.Tensor | None:
            logits = logits_of(hidden)
            assert logits is not None, "rank 0 gets the logits"
            kept.append(logits.tolist())
            return logits

        loaded.decoder.logits = keep  # type: ignore[method-assign]
    engine = make_engine(loaded, config, sender, overlap=case.overlap)
    token_ids: list[list[int]] = [[] for _ in case.prompts]
    reasons = [""] * len(case.prompts)
    cached_tokens = [0] * len(case.prompts)
    step_reports: list[StepReport] = []
    logprobs: list[list[Any]] = [[] for _ in case.prompts]
    prompt_logprobs: list[list[Any]] = [[] for _ in case.prompts]
    pages_left = preemptions = num_ahead = 0

    def drain() -> None:
        nonlocal pages_left, preemptions, num_ahead
        while engine.has_work:
            report = engine.report(engine.step())
            num_ahead += len(loaded.runner.steps_in_flight)
            for output in report.outputs:
                token_ids[int(output.request_id)] += output.token_ids
                cached_tokens[int(output.request_id)] += output.cached_tokens
                if output.logprobs is not None:
                    logprobs[int(output.request_id)] += output.logprobs.rows()
                if output.prompt_logprobs is not None:
                    assert not token_ids[int(output.request_id)], "prompts are scored before the first token"
                    prompt_logprobs[int(output.request_id)] += output.prompt_logprobs.rows()
                if output.finish_reason is not None:
                    assert reasons[int(output.request_id)] == "", "a request ended twice"
                    reasons[int(output.request_id)] = output.finish_reason
            if report.step_report is not None:
                step_reports.append(report.step_report)
            for index, given in enumerate(token_ids):
                if case.abort_after is not None and index % 3 == 0 and len(given) >= case.abort_after:
                    aborted = engine.abort(str(index))
                    if aborted is not None:
                        reasons[index] = aborted.finish_reason or ""
            pages_left, preemptions = sum(report.pages_used_per_rank), report.preemptions

    for index, prompt in enumerate(case.prompts):
        sampling = msgspec.structs.replace(case.sampling, seed=case.seeds[index]) if case.seeds else case.sampling
        generated = array("i", case.generated[index] if case.generated else ()).tobytes()
        engine.submit(Submit(str(index), array("i", prompt).tobytes(), sampling, generated))
        if not case.at_once:
            drain()
    drain()
    return Answer(
        token_ids,
        reasons,
        preemptions,
        pages_left,
        cached_tokens,
        step_reports,
        num_ahead,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        rows_logits=kept,
    )


@contextmanager
def _counted_traffic(case: Case, file: Path) -> Iterator[None]:
    """Note what this rank computes in each step, and what it sends while it attends; write it to `file` at the end."""
    if not case.counts_traffic:
        yield
        return
    steps: list[StepTraffic] = []
    attends = False

    def forward(decoder: Decoder, tokens_N: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(StepTraffic(tokens=len(tokens_N), bytes_sent=0))
        return plain_forward(decoder, tokens_N, *args, **kwargs)

    def attend(attention: StepAttention, *args: Any) -> torch.Tensor:
        nonlocal attends
        attends = True
        out = plain_attend(attention, *args)
        attends = False
        return out

    def counted(collective: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def send(ranks: Ranks, mine: torch.Tensor, *args: Any) -> torch.Tensor:
            if attends:
                steps[-1].bytes_sent += mine.numel() * mine.element_size()
            return collective(ranks, mine, *args)

        return send

    plain_forward, plain_attend = Decoder.forward, StepAttention.__call__
    with ExitStack() as stack:
        stack.enter_context(patch.object(Decoder, "forward", forward))
        stack.enter_context(patch.object(StepAttention, "__call__", attend))
        for name in ("all_gather", "all_to_all", "broadcast_from_rank_0"):
            stack.enter_context(patch.object(Ranks, name, counted(getattr(Ranks, name))))
        yield
    file.write_bytes(msgspec.json.encode(steps))


def _break_page(loaded: LoadedRank, case: Case) -> None:
    """Overwrite one page of this rank with zeros before every step but the first."""
    assert case.broken_page is not None
    launch, page = loaded.runner.launch, case.broken_page[1]
    steps = 0

    def launch_broken(batch):
        nonlocal steps
        steps += 1
        if steps > 1:
            loaded.shard.pool_L2PKTD[:, :, page] = 0
        launch(batch)

    loaded.runner.launch = launch_broken  # type: ignore[method-assign]
