"""What is measured: head layouts and mixes of context lengths.

Shapes: H query heads, K KV heads, D head dim, B sequences.
"""

import random
from dataclasses import dataclass, replace

KI = 1024
LLAMA_8B = (32, 8, 128)
LAYOUTS = [
    (32, 32, 128), LLAMA_8B, (32, 4, 128), (28, 4, 128), (40, 10, 128), (64, 8, 128), (32, 1, 128), (8, 1, 128),
    (64, 8, 64), (32, 4, 64), (64, 64, 64),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One decode step to time: the tokens of each sequence, the heads, the page size, the dtype."""

    family: str
    """uniform, waves, ragged or pages: which question the case answers."""

    lengths: tuple[int, ...]
    heads: tuple[int, int, int] = LLAMA_8B
    """H, K, D."""

    page_tokens: int = 64
    dtype: str = "bfloat16"
    label: str = ""

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def kv_bytes(self) -> int:
        """What the step must read: every key and value once."""
        _, K, D = self.heads
        return 2 * self.tokens * K * D * {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}[self.dtype]

    @property
    def name(self) -> str:
        lengths = self.label or f"{len(self.lengths)} x {short(self.lengths[0])}"
        return f"{lengths}  {'/'.join(map(str, self.heads))}"


def short(tokens: int) -> str:
    """1536 -> '1536', 4096 -> '4k', 1048576 -> '1M'."""
    if tokens % KI**2 == 0:
        return f"{tokens // KI**2}M"
    return f"{tokens // KI}k" if tokens % KI == 0 else str(tokens)


def uniform(batch: int, tokens: int, heads: tuple[int, int, int] = LLAMA_8B, family: str = "uniform") -> Case:
    return Case(family, (tokens,) * batch, heads)


def ragged(*groups: tuple[int, int]) -> Case:
    """Groups of (sequences, tokens each)."""
    lengths = tuple(tokens for count, tokens in groups for _ in range(count))
    return Case("ragged", lengths, label=" + ".join(f"{count}x{short(tokens)}" for count, tokens in groups))


def log_normal(batch: int, median: int) -> Case:
    """Context lengths as a chat service sees them; the same ones every time."""
    draw = random.Random(11)
    lengths = tuple(min(128 * KI, max(16, int(draw.lognormvariate(0.0, 1.2) * median))) for _ in range(batch))
    return Case("ragged", lengths, label=f"log-normal {batch}x~{short(median)}")


RAGGED = [
    ragged((64, 512)),
    ragged((32, 128), (32, 4 * KI)),
    ragged((1, 16 * KI), (15, 64)),
    *(ragged((1, 64 * KI), (others, 4 * KI)) for others in (7, 15, 31)),
    ragged((1, 128 * KI), (31, 4 * KI)),
    ragged((2, 32 * KI), (30, 4 * KI)),
    ragged((1, 4 * KI), (1, 32 * KI), (1, 64 * KI)),
    ragged((1, 1024 * KI), (31, 4 * KI)),
    log_normal(64, 2 * KI),
]


def full_grid() -> list[Case]:
    """Everything that kernels/README.md talks about; about a quarter of an hour on one GPU."""
    cases = [
        uniform(batch, tokens, heads)
        for heads in LAYOUTS
        for batch in (1, 4, 8, 16, 32, 64, 256)
        for tokens in (512, 1 * KI, 4 * KI, 16 * KI, 32 * KI, 128 * KI)
    ]
    cases += [uniform(1, tokens, heads) for heads in LAYOUTS for tokens in (256 * KI, 512 * KI, 1024 * KI)]
    # A fixed split shows a saw-tooth over the batch; an even deal of tiles does not.
    batches = sorted({1, 2, 4, *range(8, 265, 8), 131, 132, 133, 263})
    cases += [uniform(batch, 16 * KI, (8, 1, 128), "waves") for batch in batches]
    cases += RAGGED
    cases += [
        replace(
            uniform(batch, tokens, family="pages"), page_tokens=page, label=f"{batch} x {short(tokens)} page {page}"
        )
        for page in (16, 64, 128)
        for batch, tokens in ((1, 32 * KI), (8, 16 * KI), (32, 4 * KI))
    ]
    return cases


def quick_grid() -> list[Case]:
    """The rows of the table of targets, in under three minutes on one GPU."""
    cases = [uniform(1, tokens * KI) for tokens in (1, 4, 16, 32, 128)]
    cases += [uniform(8, tokens * KI) for tokens in (4, 16, 32)]
    cases += [uniform(1, tokens * KI, (8, 1, 128)) for tokens in (32, 128)]
    cases += [uniform(1, 256 * KI, (64, 64, 64))]
    cases += [ragged((1, 64 * KI), (31, 4 * KI)), ragged((1, 128 * KI), (31, 4 * KI)), uniform(63, 4 * KI)]
    return cases


def cpu_grid() -> list[Case]:
    """What a CPU can be asked: one long context, a small batch, a ragged one; float32 and bfloat16."""
    cases = [uniform(1, tokens * KI) for tokens in (1, 4, 16, 32)]
    cases += [uniform(8, 4 * KI), ragged((1, 16 * KI), (15, 64))]
    return [replace(case, dtype=dtype) for dtype in ("float32", "bfloat16") for case in cases]


def cpu_quick_grid() -> list[Case]:
    return [case for case in cpu_grid() if case.tokens <= 4 * KI]
