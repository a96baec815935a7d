"""Decode steps as graphs. Without a GPU a tape stands for the capture (see capture_tape), and Triton's interpreter for
the kernels; with one, the real thing."""

import json
import multiprocessing as mp
import os
import weakref
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zmq

from capture_tape import CaptureError, Tape, TapeCapture, storages_of
from checkpoints import checkpoint, hf_greedy, random_prompts
from leanserve.contracts.batch import Batch
from leanserve.contracts.config import BatchOptions, CacheOptions, EngineConfig
from leanserve.contracts.messages import Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.distributed.channel import StepSender
from leanserve.distributed.ranks import Ranks
from leanserve.launch.all_ranks import make_engine
from leanserve.launch.loading import LoadedRank, load_rank
from leanserve.launch.place import Place
from leanserve.model.architecture import read_architecture
from leanserve.worker.graphs import CudaCapture, capture_sizes
from leanserve.worker.runner import Runner
from mirror_ranks import mirrored_rank
from triton_interpreter import needs_interpreter

PAGE = 16
MAX_SEQUENCES = 4
NEW_TOKENS = 6
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 30,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 1.7, 2.0, 2.2],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
}
MODEL: dict[str, Any] = {"family": "mistral", "layers": 2, "window": 20, "rope": LONGROPE, "tied": True}
ARRIVALS = {0: [13, 30], 1: [1], 4: [28]}
"""Lengths of the prompts that arrive after so many steps."""


def test_sizes_reach_from_one_row_to_all():
    assert capture_sizes(1) == (1,)
    assert capture_sizes(3) == (1, 2, 3)
    assert capture_sizes(20) == (1, 2, 4, 8, 16, 20)
    sizes = capture_sizes(300)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-3:] == (256, 288, 300)
    for rows in range(1, 301):
        wasted = min(size for size in sizes if size >= rows) - rows
        assert wasted < (8 if rows < 64 else 16 if rows < 256 else 32)


def load(
    model_dir: Path, device: str, *, enforce_eager: bool = False, attention: str = "triton"
) -> tuple[LoadedRank, EngineConfig]:
    token_bytes = read_architecture(model_dir).kv_bytes_per_token(torch.float32.itemsize)
    config = EngineConfig(
        model_dir=str(model_dir),
        dtype="float32",
        device=device,  # type: ignore[arg-type]
        attention=attention,  # type: ignore[arg-type]
        enforce_eager=enforce_eager,
        cache=CacheOptions(page_tokens=PAGE, kv_memory_bytes=40 * PAGE * token_bytes, max_context_tokens=128),
        batch=BatchOptions(max_batch_tokens=64, max_sequences=MAX_SEQUENCES),
    )
    place = Place(rank=0, size=1, local_rank=0, local_size=1, agent_pid=os.getpid())
    return load_rank(place, dist.HashStore(), config, lambda done, total: None), config


def prompts() -> list[list[int]]:
    return random_prompts([length for lengths in ARRIVALS.values() for length in lengths], seed=21)


def serve(loaded: LoadedRank, config: EngineConfig, folder: Path, *, overlap: bool | None = None) -> list[list[int]]:
    """Greedy tokens of prompts that come in the midst of each other's completions."""
    tokens: list[list[int]] = [[] for _ in prompts()]
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    waiting = list(enumerate(prompts()))
    with zmq.Context() as context:
        sender = StepSender(context, folder, num_ranks=1)
        engine = make_engine(loaded, config, sender, overlap=overlap)
        step = 0
        while waiting or engine.has_work:
            for _ in ARRIVALS.get(step, []):
                index, prompt = waiting.pop(0)
                engine.submit(Submit(str(index), array("i", prompt).tobytes(), greedy))
            for output in engine.step():
                tokens[int(output.request_id)] += output.token_ids
            step += 1
    return tokens


def compare_with_eager(runner: Runner) -> list[tuple[int, bool]]:
    """Compute each step both ways. Returns, as it grows: how many rows, and whether the logits were the same bits."""
    graphs, seen = runner.graphs, []
    assert graphs is not None

    def both(num_rows: int) -> torch.Tensor | None:
        eager = runner.decode_eagerly(min(size for size in graphs.sizes if size >= num_rows))
        logits = graphs(num_rows)
        assert eager is not None
        assert logits is not None
        seen.append((num_rows, torch.equal(eager[:num_rows], logits)))
        return logits

    runner.graphs = both  # type: ignore[assignment]
    return seen


def _replay_a_tape(model_dir: Path, folder: Path) -> None:
    """In a process whose Triton interprets."""
    torch.set_num_threads(1)
    loaded, config = load(model_dir, "cpu")
    capture = TapeCapture()
    loaded.runner.capture_graphs(capture, lambda done, total: None)
    seen = compare_with_eager(loaded.runner)
    tokens = serve(loaded, config, folder, overlap=True)
    with torch.inference_mode(), Tape(storages_of(lambda: loaded.runner.decode_eagerly(MAX_SEQUENCES))) as tape:
        loaded.runner.decode_eagerly(MAX_SEQUENCES)
    # Of the first tape what follows is the copy into the logits' buffer.
    same_launches = tape.launches == capture.tapes[0].launches[: len(tape.launches)]
    answer = {"tokens": tokens, "seen": seen, "replays": capture.replays, "same_launches": same_launches}
    (folder / "answer.json").write_text(json.dumps(answer))


@needs_interpreter
def test_a_taped_step_serves_every_later_one_bit_for_bit(tmp_path_factory, tmp_path, monkeypatch):
    """Captured before the first request: no length, page table, batch or token of any later step may matter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model_dir = checkpoint(tmp_path_factory, **MODEL)
    child = mp.get_context("spawn").Process(target=_replay_a_tape, args=(model_dir, tmp_path))
    child.start()
    child.join(240)
    assert child.exitcode == 0
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["tokens"] == hf_greedy(model_dir, prompts(), NEW_TOKENS)
    assert answer["replays"] == len(answer["seen"]) > 5
    assert {2, 3} <= {rows for rows, _ in answer["seen"]}, "3 lies between two captured sizes"
    assert all(same for _, same in answer["seen"])
    assert answer["same_launches"], "a step with other rows, lengths and pages launches the same"


@pytest.mark.parametrize(("num_ranks", "split"), [(1, "replicated"), (3, "replicated"), (3, "all")])
def test_a_decode_step_leaves_the_host_alone(tmp_path_factory, monkeypatch, num_ranks, split):
    """On a device without numbers: reading one, or mixing in one of the host's, is an error. The CPU, where device and
    host are one, cannot show that."""
    pytest.importorskip("lean_attention.stream_k")  # before the variable: its kernels are not to be interpreted here
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the Triton backend be chosen without a GPU
    device = torch.device("meta")
    architecture = read_architecture(checkpoint(tmp_path_factory, **MODEL))
    decoder, shard = mirrored_rank(
        architecture, num_ranks, num_pages=40, page_tokens=PAGE, device=device, dtype=torch.bfloat16, split=split
    )
    runner = Runner(decoder, shard, decoder.ranks, max_sequences=4, max_context_tokens=128, backend="triton")
    with torch.inference_mode(), Tape(storages_of(lambda: runner.decode_eagerly(4))) as tape:
        logits = runner.decode_eagerly(4)
    assert logits is not None
    assert (logits.shape, logits.device) == ((4, architecture.vocab_size), device)
    names = [name for name, *_ in tape.launches]
    for operator, launches in (("decode", 2), ("append_kv", 2), ("deal_tiles", 1)):
        assert names.count(f"lean_attention::{operator}") == launches
    attended = [leaves for name, *leaves in tape.launches if name == "lean_attention::decode"]
    out_dtypes = {leaf for leaves in attended for leaf in leaves if isinstance(leaf, torch.dtype)}
    # One rank rounds where it attends, without a launch for it.
    assert out_dtypes == {torch.bfloat16 if num_ranks == 1 else torch.float32}


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        (lambda x, y: x.sum().item(), "waits for the device"),
        (lambda x, y: x[x > 0], "waits for the device"),
        (lambda x, y: x + y, "reads a tensor of shape"),
    ],
)
def test_the_tape_refuses_what_a_capture_would(work, complaint):
    x, y = torch.ones(3), torch.ones(3)
    with pytest.raises(CaptureError, match=complaint), Tape(storages_of(lambda: x)):
        work(x, y)


def test_a_tape_replays_what_python_did_then():
    """So a step whose Python depends on lengths is found out: it gives the old answer."""
    x, out, factor = torch.ones(3), torch.zeros(3), 2.0

    def work() -> None:
        out.copy_((x * factor).add_(1))

    capture = TapeCapture()
    replay = capture(lambda: work())
    x.fill_(5.0)
    factor = 100.0
    replay()
    assert out.tolist() == [11.0] * 3


@pytest.mark.gpu
def test_cuda_graphs_replay_the_bits_of_eager_steps(tmp_path_factory, tmp_path):
    model_dir = checkpoint(tmp_path_factory, **MODEL)
    loaded, config = load(model_dir, "cuda")
    assert loaded.info.captures_graphs
    seen = compare_with_eager(loaded.runner)
    assert serve(loaded, config, tmp_path) == hf_greedy(model_dir, prompts(), NEW_TOKENS)
    assert len(seen) > 5
    assert all(same for _, same in seen)
    eager, config = load(model_dir, "cuda", enforce_eager=True)
    assert not eager.info.captures_graphs
    assert serve(eager, config, tmp_path) == hf_greedy(model_dir, prompts(), NEW_TOKENS)


@pytest.mark.gpu
def test_the_host_waits_for_the_device_only_to_collect(tmp_path_factory):
    """Prompts and decode rows of every kind: torch raises where a launch would wait. (`test_host_waits` shows the same
    without a GPU, but for copies that would wait although they look right.)"""
    loaded, config = load(checkpoint(tmp_path_factory, **MODEL), "cuda")
    wishes = [
        SamplingParams(temperature=0, max_tokens=60),
        SamplingParams(temperature=1.1, seed=1, max_tokens=60, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=2, max_tokens=60),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=3, seed=3, max_tokens=60),
        SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=(3, 4, 5), seed=4, max_tokens=60),
    ]
    runner = loaded.runner
    launch, launched = runner.launch, 0

    def launch_without_waiting(batch: Batch) -> None:
        nonlocal launched
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched += 1

    runner.launch = launch_without_waiting  # type: ignore[method-assign]
    with zmq.Context() as context:
        engine = make_engine(loaded, config, StepSender(context, Path("unused"), num_ranks=1))
        for index, sampling in enumerate(wishes):
            prompt = array("i", random_prompts([20], seed=index)[0]).tobytes()
            engine.submit(Submit(str(index), prompt, sampling))
        while engine.has_work:
            engine.step()
    assert launched > 50


@pytest.mark.gpu
def test_a_replayed_step_allocates_nothing(tmp_path_factory):
    """Not even memory that the allocator has at hand."""
    loaded, _ = load(checkpoint(tmp_path_factory, **MODEL), "cuda")
    assert loaded.runner.graphs is not None
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for rows in (1, 3, 4, 2):
        loaded.runner.graphs(rows)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_work_that_needs_the_host_is_refused():
    with pytest.raises(RuntimeError, match="captur"):
        CudaCapture(torch.device("cuda"))(lambda: torch.ones(3, device="cuda").sum().item())


class _Graph:
    """Does its work again, and nothing else holds on to it."""

    def __init__(self, work: Callable[[], None]) -> None:
        work()
        self._work = work

    def replay(self) -> None:
        self._work()


def test_graphs_are_gone_before_the_group_is_left(tmp_path_factory):
    """NCCL waits in vain for a communicator's end while a graph with one of its kernels lives."""
    model_dir = checkpoint(tmp_path_factory, "llama", layers=1)
    loaded, _ = load(model_dir, "cpu", attention="portable")
    graphs: list[weakref.ref[_Graph]] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = _Graph(work)
        graphs.append(weakref.ref(graph))
        return graph.replay

    loaded.runner.capture_graphs(capture, lambda done, total: None)
    alive_when_left: list[int] = []

    class Group(Ranks):
        def leave(self) -> None:
            alive_when_left.append(sum(graph() is not None for graph in graphs))

    group = Group(rank=0, size=1, device=loaded.ranks.device, group=None, stages_through_host=False)
    assert all(graph() is not None for graph in graphs)
    replace(loaded, ranks=group).leave()
    assert len(graphs) == len(capture_sizes(MAX_SEQUENCES))
    assert alive_when_left == [0]
