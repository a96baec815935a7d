"""transformers under measurement: `generate` with sdpa attention and its default DynamicCache, as its users call it.

Decode is measured on caches that were filled with random numbers, as on LeanServe's side.
"""

import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList

from leanserve.bench.noise import fill_with_noise, random_prompts
from leanserve.bench.system import tasks_from
from leanserve.bench.task import MAX_STEPS, StepClock, Task, Timing, repeated

__all__ = ["ATTENTION", "generate", "load", "run_transformers"]

ATTENTION = "sdpa"
WARM_UP_TOKENS = 512


def run_transformers(rank: int, connection: Connection, threads: int, model_dir: Path) -> None:
    """The peer's one process: does every task, loading the model anew for each."""
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    for task in tasks_from(connection):
        model = load(model_dir, task.cell.dtype)
        measure = _decode if task.quantity == "decode" else _first_token
        connection.send_bytes(msgspec.json.encode(measure(model, task)))
        del model  # before the next one is loaded


def load(model_dir: Path, dtype: str) -> Any:
    """A causal language model of transformers, whose own type hints do not let it generate."""
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
    ).eval()


@torch.inference_mode()
def generate(model: Any, prompts: torch.Tensor, max_new_tokens: int, **options: object) -> torch.Tensor:
    """Greedy tokens, [batch, new tokens]."""
    output = model.generate(
        prompts.long(),
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )
    return output[:, prompts.shape[1] :]


def _first_token(model: Any, task: Task) -> Timing:
    cell = task.cell
    seed = 0

    def run(tokens: int = cell.context_tokens) -> float:
        nonlocal seed
        seed += 1
        prompts = random_prompts(cell.batch, tokens, model.config.vocab_size, seed=seed)
        started = time.perf_counter()
        generate(model, prompts, max_new_tokens=1)
        return time.perf_counter() - started

    run(min(cell.context_tokens, WARM_UP_TOKENS))
    return repeated(run)


class _Clocked(StoppingCriteria):
    """Called after each token of the batch."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        return cast(torch.BoolTensor, torch.full((input_ids.shape[0],), self._clock.tick(), dtype=torch.bool))


def _decode(model: Any, task: Task) -> Timing:
    cell = task.cell
    clock = StepClock()
    prompts = random_prompts(cell.batch, cell.context_tokens, model.config.vocab_size, seed=0)
    generate(
        model,
        prompts,
        max_new_tokens=MAX_STEPS + 1,
        past_key_values=_filled_cache(model, cell.batch, cell.context_tokens - 1),
        stopping_criteria=StoppingCriteriaList([_Clocked(clock)]),
    )
    return clock.timing()


def _filled_cache(model: Any, batch: int, tokens: int) -> DynamicCache:
    """A cache that holds all but the newest token of each context."""
    config = model.config
    noise = torch.empty(batch, config.num_key_value_heads, tokens, config.head_dim, dtype=model.dtype)
    fill_with_noise(noise)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(noise, noise, layer)
    return cache
