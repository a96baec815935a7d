"""LeanServe under measurement: one process per rank, the real engine on rank 0, the step channel to the others.

Decode is measured on caches that were filled with random numbers: what a step costs does not depend on them, and to
compute them over the whole grid would take hours on a CPU. All else is what a server runs, but for HTTP.
"""

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zmq

from leanserve.bench.noise import fill_with_noise, random_prompts
from leanserve.bench.system import tasks_from
from leanserve.bench.task import MAX_STEPS, Quantity, StepClock, Task, Timing, repeated
from leanserve.contracts.batch import Batch, Row, Stop
from leanserve.contracts.config import (
    CPU_BATCH,
    GPU_BATCH,
    BatchOptions,
    CacheOptions,
    Device,
    EngineConfig,
)
from leanserve.contracts.messages import Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.channel import StepReceiver, StepSender
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.launch.all_ranks import AllRanks, follow, make_engine
from leanserve.launch.loading import LoadedRank, load_rank
from leanserve.launch.place import Place
from leanserve.model.architecture import read_architecture

__all__ = ["engine_on_filled_cache", "run_rank"]

PAGE_TOKENS = 64
WARM_UP_TOKENS = 512
OWN_TOKENS, SHARED_NEW_TOKENS = 100, 8
"""Of each request behind a prefix in common: its prompt's own tokens, and its completion's."""
COMPARED_TOKENS = 16


def run_rank(
    rank: int,
    connection: Connection,
    size: int,
    threads: int,
    model_dir: Path,
    folder: Path,
    device: Device = "cpu",
) -> None:
    """One rank's process: does every task, loading the model anew with a pool for just that task.

    Args:
        threads: of this rank.
        folder: shared by the ranks; where they meet.
    """
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    place = Place(rank=rank, size=size, local_rank=rank, local_size=size, agent_pid=os.getppid())
    for number, task in enumerate(tasks_from(connection)):
        config = _config(task, size, model_dir, device)
        run_dir = folder / str(number)
        run_dir.mkdir(exist_ok=True)
        store = dist.FileStore(str(run_dir / "store"), size)  # pyright: ignore[reportPrivateImportUsage]
        loaded = load_rank(place, store, config, lambda done, total: None)
        if task.quantity == "decode":
            fill_with_noise(loaded.shard.pool_L2PKTD)
        with zmq.Context() as context:
            if rank > 0:
                follow(loaded, StepReceiver(context, run_dir, rank))
            else:
                sender = StepSender(context, run_dir, size)
                timing = _MEASURES[task.quantity](loaded, config, sender, task)
                sender.send(Stop())
                sender.close()
                connection.send_bytes(msgspec.json.encode(timing))
        loaded.leave()
        del loaded  # before the next pool is made


def _config(task: Task, size: int, model_dir: Path, device: Device) -> EngineConfig:
    """Pools that just hold the task, and a server's steps."""
    cell = task.cell
    dtype_bytes = getattr(torch, cell.dtype).itemsize
    page_bytes = read_architecture(model_dir).kv_bytes_per_token(dtype_bytes) * PAGE_TOKENS
    more_tokens = OWN_TOKENS + MAX_STEPS + 2
    pages_per_sequence = -(-(cell.context_tokens + more_tokens) // PAGE_TOKENS)
    pages_per_rank = cell.batch * -(-pages_per_sequence // size)
    return EngineConfig(
        model_dir=str(model_dir),
        dtype=cell.dtype,
        device=device,
        cache=CacheOptions(
            page_tokens=PAGE_TOKENS,
            kv_memory_bytes=pages_per_rank * page_bytes,
            prefix_cache=task.quantity != "unshared prefix",
        ),
        batch=CPU_BATCH if device == "cpu" else GPU_BATCH,
    )


def _submit(engine: Engine, prompts: torch.Tensor, max_tokens: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.submit(Submit(str(index), prompt.numpy().tobytes(), sampling))


def _first_token(loaded: LoadedRank, config: EngineConfig, sender: StepSender, task: Task) -> Timing:
    cell = task.cell
    engine = make_engine(loaded, config, sender)
    seed = 0

    def run(tokens: int = cell.context_tokens) -> float:
        nonlocal seed
        seed += 1
        prompts = random_prompts(cell.batch, tokens, loaded.info.vocab_size, seed=seed)
        started = time.perf_counter()
        _submit(engine, prompts, max_tokens=1)
        waited_s: list[float] = []
        while engine.has_work:
            outputs = engine.step()
            waited_s += [time.perf_counter() - started] * len(outputs)
        return sum(waited_s) / len(waited_s)

    run(min(cell.context_tokens, WARM_UP_TOKENS))
    return repeated(run)


def _with_one_prefix(loaded: LoadedRank, config: EngineConfig, sender: StepSender, task: Task) -> Timing:
    cell, vocab_size = task.cell, loaded.info.vocab_size
    engine = make_engine(loaded, config, sender)
    prefix = random_prompts(1, cell.context_tokens, vocab_size, seed=0).expand(cell.batch, -1)
    own = random_prompts(cell.batch, OWN_TOKENS, vocab_size, seed=1)
    _answers(engine, own[:1], 1)
    started = time.perf_counter()
    _answers(engine, torch.cat([prefix, own], dim=1), SHARED_NEW_TOKENS)
    return Timing(seconds=time.perf_counter() - started, samples=1)


def _tokens(loaded: LoadedRank, config: EngineConfig, sender: StepSender, task: Task) -> Timing:
    prompts = random_prompts(task.cell.batch, task.cell.context_tokens, loaded.info.vocab_size, seed=0)
    started = time.perf_counter()
    token_ids = _answers(make_engine(loaded, config, sender), prompts, COMPARED_TOKENS)
    return Timing(seconds=time.perf_counter() - started, samples=1, token_ids=token_ids)


def _answers(engine: Engine, prompts: torch.Tensor, max_tokens: int) -> list[list[int]]:
    """Serve the prompts to their ends. Returns the tokens of each."""
    token_ids: list[list[int]] = [[] for _ in prompts]
    _submit(engine, prompts, max_tokens)
    while engine.has_work:
        for output in engine.step():
            token_ids[int(output.request_id)] += output.token_ids
    return token_ids


def _decode(loaded: LoadedRank, config: EngineConfig, sender: StepSender, task: Task) -> Timing:
    cell = task.cell
    engine = engine_on_filled_cache(loaded, config, sender)
    prompts = random_prompts(cell.batch, cell.context_tokens, loaded.info.vocab_size, seed=0)
    _submit(engine, prompts, max_tokens=MAX_STEPS + 1)
    clock = StepClock()
    enough = False
    while not enough:
        engine.step()
        enough = clock.tick()
    return clock.timing()


def engine_on_filled_cache(loaded: LoadedRank, config: EngineConfig, sender: StepSender) -> Engine:
    """An engine that takes whatever lies in a prompt's pages for its keys and values.

    Of the prompt itself only the last token is computed, everything after it as ever. So one step admits whatever the
    pool holds, while the rank was made, and on a GPU warmed up, for the steps of `config`.
    """
    whole_pool = BatchOptions(max_batch_tokens=loaded.sharding.total_tokens, max_sequences=config.batch.max_sequences)
    scheduler = Scheduler(loaded.sharding, whole_pool, loaded.info.max_context_tokens)
    return Engine(scheduler, _LastTokens(loaded.runner, sender), (), overlap=loaded.info.captures_graphs)


class _LastTokens(AllRanks):
    """Computes of each row the last token alone."""

    def launch(self, batch: Batch) -> None:
        rows = [Row(row.sequence_id, row.start + row.count - 1, 1, row.samples) for row in batch.rows]
        super().launch(msgspec.structs.replace(batch, rows=rows))


_MEASURES: dict[Quantity, Callable[[LoadedRank, EngineConfig, StepSender, Task], Timing]] = {
    "decode": _decode,
    "first token": _first_token,
    "shared prefix": _with_one_prefix,
    "unshared prefix": _with_one_prefix,
    "tokens": _tokens,
}
