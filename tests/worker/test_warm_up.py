"""What warming up compiles is all that requests need, whatever their lengths. Without a GPU: Triton's interpreter runs
the kernels, and what Triton would compile for each launch is read off its arguments."""

import json
import multiprocessing as mp
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from checkpoints import checkpoint, random_prompts
from leanserve.contracts.batch import Batch
from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import Submit
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from leanserve.model.architecture import read_architecture
from leanserve.model.weights import load_weights
from leanserve.worker.runner import Runner
from leanserve.worker.warm_up import warm_up
from mirror_ranks import mirrored_rank
from triton_interpreter import needs_interpreter

PAGE = 16
PAGES = 20
STEP_TOKENS = 24
MODELS: list[tuple[int, dict[str, Any]]] = [
    (1, {"family": "qwen3", "heads": 6, "kv_heads": 2, "head_dim": 16}),
    (3, {"family": "mistral", "window": 20, "heads": 6, "kv_heads": 2, "head_dim": 16}),
]
"""With so many ranks each."""
KERNELS = {"deal_kernel", "decode_kernel", "prefill_kernel", "append_kernel", "norm_kernel", "heads_kernel"}
KERNELS |= {"swiglu_kernel"}
PROMPTS_TOKENS = [1, 40, 3]


@contextmanager
def compiled_for(binaries: set[tuple[str, str]]) -> Iterator[None]:
    """Within: note every launch's kernel, and its key in Triton's cache of compiled kernels on a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[Any, Callable[..., tuple[Any, Any, Any]]] = {}
    run = InterpretedFunction.run

    def noting(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if kernel not in binders:
            jitted = JITFunction(kernel.fn, **kernel.kwargs)
            binders[kernel] = create_function_from_signature(jitted.signature, jitted.params, backend)
        _, specialization, options = binders[kernel](*args, **kwargs)
        binaries.add((kernel.__name__, f"{specialization} {options}"))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with patch.object(InterpretedFunction, "run", noting):
        yield


def _binaries(model_dir: Path, num_ranks: int) -> dict[str, Any]:
    """By warming up, and by requests of many lengths."""
    device = torch.device("cpu")
    architecture = read_architecture(model_dir)
    decoder, shard = mirrored_rank(
        architecture, num_ranks, num_pages=PAGES, page_tokens=PAGE, device=device, backend="triton"
    )
    load_weights(decoder, model_dir, progress=lambda done, total: None)
    sharding = KvSharding(PAGE, (PAGES,) * num_ranks)
    told: list[tuple[int, int]] = []
    warm: set[tuple[str, str]] = set()
    with compiled_for(warm):
        warm_up(
            decoder, shard, decoder.ranks, sharding,
            max_batch_tokens=STEP_TOKENS, max_context_tokens=128, backend="triton",
            progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
    runner = Runner(decoder, shard, decoder.ranks, max_sequences=8, max_context_tokens=128, backend="triton")
    needed: set[tuple[str, str]] = set()
    shapes: set[tuple[int, int]] = set()
    launch = runner.launch

    def noting(batch: Batch) -> None:
        decode = sum(row.count == 1 and row.samples for row in batch.rows)
        shapes.add((decode, sum(row.count for row in batch.rows) - decode))
        launch(batch)

    runner.launch = noting  # type: ignore[method-assign]
    options = BatchOptions(max_batch_tokens=STEP_TOKENS, max_sequences=8)
    engine = Engine(Scheduler(sharding, options, 128), runner, (), overlap=True)
    greedy = SamplingParams(temperature=0, max_tokens=3)
    with compiled_for(needed):
        for index, prompt in enumerate(random_prompts(PROMPTS_TOKENS, seed=5)):
            engine.submit(Submit(str(index), array("i", prompt).tobytes(), greedy))
            engine.step()
        while engine.has_work:
            engine.step()
    return {
        "kernels": sorted({name for name, _ in warm}),
        "cold": sorted(needed - warm),
        "warm": len(needed & warm),
        "shapes": len(shapes),
        "told": told,
    }


def _find_binaries(models: list[tuple[int, Path]], answer: Path) -> None:
    """In a process whose Triton interprets."""
    torch.set_num_threads(1)
    answer.write_text(json.dumps([_binaries(model_dir, num_ranks) for num_ranks, model_dir in models]))


@needs_interpreter
def test_no_request_needs_a_kernel_that_is_not_compiled(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    models = [(num_ranks, checkpoint(tmp_path_factory, layers=1, **model)) for num_ranks, model in MODELS]
    answer = tmp_path / "answer.json"
    child = mp.get_context("spawn").Process(target=_find_binaries, args=(models, answer))
    child.start()
    child.join(240)
    assert child.exitcode == 0
    one, three = json.loads(answer.read_text())
    assert set(one["kernels"]) == KERNELS
    assert set(three["kernels"]) == KERNELS | {"merge_kernel", "visible_kernel"}
    for found in (one, three):
        assert found["cold"] == []
        assert found["warm"] >= len(KERNELS)
        assert found["shapes"] > 3, "the requests make steps of many shapes"
        assert found["told"] == [[0, 3], [1, 3], [2, 3], [3, 3]]


@pytest.mark.parametrize(("pages", "step_tokens", "context"), [((1, 4), 2048, 64), ((3,), 1, 2), ((2, 2, 2), 64, 90)])
def test_it_fits_any_pool(tmp_path_factory, pages, step_tokens, context):
    """However small: no page that is not there, no position beyond the context."""
    model_dir = checkpoint(tmp_path_factory, "llama", layers=1)
    architecture = read_architecture(model_dir)
    device = torch.device("cpu")
    decoder, shard = mirrored_rank(architecture, len(pages), num_pages=pages[0], page_tokens=PAGE, device=device)
    load_weights(decoder, model_dir, progress=lambda done, total: None)
    positions: list[int] = []
    forward = decoder.forward

    def noting(tokens_N: torch.Tensor, positions_N: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        positions.extend(positions_N.tolist())
        return forward(tokens_N, positions_N, *args, **kwargs)

    decoder.forward = noting  # type: ignore[method-assign]
    warm_up(
        decoder, shard, decoder.ranks, KvSharding(PAGE, pages),
        max_batch_tokens=step_tokens, max_context_tokens=context, backend="portable",
        progress=lambda done, total: None,
    )  # fmt: skip
    assert max(positions) <= max(context, 3) - 1
