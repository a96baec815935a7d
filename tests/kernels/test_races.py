"""What only a real GPU can get wrong: races beside other work, graph replay, addresses beyond 2^31, stale memory.

Run with `pytest -m gpu tests/kernels`; the public face's own tests run on the GPU too where there is one.
"""

import pytest
import torch

from closeness import assert_close
from lean_attention import PagedKV, append_kv, lean_decode, lean_prefill, plan_decode, reference
from paged_cache import page_out, random_contexts

pytestmark = pytest.mark.gpu

LAUNCHES = 10_000
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return "cuda"


def ragged_cache(generator: torch.Generator, device: str, lengths: list[int]) -> PagedKV:
    contexts = random_contexts(lengths, KV_HEADS, HEAD_DIM, generator)
    return page_out(contexts, 64, generator, dtype=torch.bfloat16, device=device)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_ctas", [None, 1000])
def test_ten_thousand_launches_beside_a_kernel_that_holds_the_gpu(num_ctas, cuda, generator):
    kv = ragged_cache(generator, cuda, [9000, 3, 0, 640, 64])
    q = torch.randn(5, HEADS, HEAD_DIM, generator=generator).to(cuda, torch.bfloat16)
    plan = plan_decode(kv, HEADS, num_ctas=num_ctas)
    expected = reference.lean_decode(q, kv, plan_decode(kv, HEADS, backend="portable"))
    first = lean_decode(q, kv, plan)
    assert_close(first.out, expected.out, torch.bfloat16)
    wrong = torch.zeros((), dtype=torch.int64, device=cuda)
    hog_stream = torch.cuda.Stream()
    hogged = torch.randn(4096, 4096, device=cuda)
    for launch in range(LAUNCHES):
        if launch % 50 == 0:
            # A matrix product of ever another size takes and frees multiprocessors at ever other times.
            with torch.cuda.stream(hog_stream):
                rows = 128 + 64 * (launch // 50 % 60)
                torch.mm(hogged[:rows], hogged, out=torch.empty(rows, 4096, device=cuda))
        state = lean_decode(q, kv, plan)
        # Compared on the device: pieces are summed in order, so any difference in bits is a race.
        wrong += (state.out != first.out).any() | (state.lse != first.lse).any()
    assert int(wrong) == 0
    assert plan.stream_k is not None
    assert not plan.stream_k.counters.any()


def test_two_streams_with_a_plan_each_do_not_meet(cuda, generator):
    kv = ragged_cache(generator, cuda, [5000, 100])
    q = torch.randn(2, HEADS, HEAD_DIM, generator=generator).to(cuda, torch.bfloat16)
    expected = lean_decode(q, kv, plan_decode(kv, HEADS))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = [torch.zeros((), dtype=torch.int64, device=cuda) for _ in streams]
    for _ in range(500):
        for stream, count in zip(streams, wrong, strict=True):
            with torch.cuda.stream(stream):
                state = lean_decode(q, kv, plan_decode(kv, HEADS))
                count += (state.out != expected.out).any()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


@pytest.mark.parametrize("window", [None, 300])
def test_a_captured_step_serves_every_length(window, cuda, generator):
    full = [4096, 4096, 4096]
    kv = ragged_cache(generator, cuda, full)
    q = torch.randn(3, HEADS, HEAD_DIM, generator=generator).to(cuda, torch.bfloat16)
    positions = kv.lengths - 1

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        plan = plan_decode(kv, HEADS, window=window, q_positions=positions)
        lean_decode(q, kv, plan)
        # A second layer under the same plan.
        return tuple(lean_decode(q, kv, plan))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    # The lengths at capture must not matter; 0 is a padded row.
    for lengths in ([1, 1, 1], [0, 4096, 63], [4096, 0, 0], [0, 0, 0], [64, 65, 4000]):
        kv.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        positions.copy_(kv.lengths - 1)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        plan = plan_decode(kv, HEADS, window=window, q_positions=positions, backend="portable")
        expected = reference.lean_decode(q, kv, plan)
        assert_close(out, expected.out, torch.bfloat16)
        assert_close(lse, expected.lse, torch.bfloat16)


def test_no_length_batch_or_grid_compiles_again(cuda, generator):
    from lean_attention.stream_k import decode_kernel

    def binaries() -> int:
        return len(decode_kernel.device_caches[torch.cuda.current_device()][0])

    def serve(lengths: list[int], num_ctas: int) -> None:
        kv = ragged_cache(generator, cuda, lengths)
        q = torch.zeros(len(lengths), HEADS, HEAD_DIM, device=cuda, dtype=torch.bfloat16)
        lean_decode(q, kv, plan_decode(kv, HEADS, num_ctas=num_ctas))

    serve([100, 200], 132)
    before = binaries()
    for lengths, num_ctas in (([70], 1), ([5000] * 16, 264), ([1, 0, 3000], 77)):
        serve(lengths, num_ctas)
    assert binaries() == before


def test_pools_beyond_two_to_the_31_elements(cuda, generator):
    # The last page begins at element 2^31 + 2^20 of each pool: 4.3 GB in bfloat16.
    page_elements = KV_HEADS * 64 * HEAD_DIM
    pages = (2**31 + 2**20) // page_elements + 1
    if torch.cuda.mem_get_info()[0] < 3 * 2 * pages * page_elements:
        pytest.skip("needs 13 GB of free GPU memory")
    k, v = (torch.zeros(pages, KV_HEADS, 64, HEAD_DIM, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    table = torch.tensor([[pages - 1, pages - 3]], dtype=torch.int32, device=cuda)
    lengths = torch.tensor([100], dtype=torch.int32, device=cuda)
    kv = PagedKV(k, v, table, lengths)
    new = torch.randn(2, 100, KV_HEADS, HEAD_DIM, generator=generator).to(cuda, torch.bfloat16)
    token = torch.arange(100, device=cuda)
    append_kv(new[0], new[1], kv, table[0][token // 64], (token % 64).int())

    few = PagedKV(k[-3:].clone(), v[-3:].clone(), torch.tensor([[2, 0]], dtype=torch.int32, device=cuda), lengths)
    q = torch.randn(1, HEADS, HEAD_DIM, generator=generator).to(cuda, torch.bfloat16)
    expected = reference.lean_decode(q, few, plan_decode(few, HEADS, backend="portable"))
    assert_close(lean_decode(q, kv, plan_decode(kv, HEADS)).out, expected.out, torch.bfloat16)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=cuda)
    assert_close(lean_prefill(q, kv, offsets, lengths - 1).out, expected.out, torch.bfloat16)
    assert few.k[2, :, 0].float().abs().sum() > 0


def test_an_unpaged_cache_beyond_two_to_the_31_elements(cuda, generator):
    # One sequence's own tokens span more than 2^31 elements: [B, S, K, D] seen as [B, K, S, D].
    tokens = 2**31 // (KV_HEADS * HEAD_DIM) + 200
    if torch.cuda.mem_get_info()[0] < 3 * 2 * tokens * KV_HEADS * HEAD_DIM:
        pytest.skip("needs 13 GB of free GPU memory")
    k, v = (torch.zeros(1, tokens, KV_HEADS, HEAD_DIM, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    tail = torch.randn(2, 100, KV_HEADS, HEAD_DIM, generator=generator).to(cuda, torch.bfloat16)
    k[0, -100:], v[0, -100:] = tail[0], tail[1]
    lengths = torch.tensor([tokens], dtype=torch.int32, device=cuda)
    kv = PagedKV.from_contiguous(k.transpose(1, 2), v.transpose(1, 2), lengths)
    q = torch.randn(1, HEADS, HEAD_DIM, generator=generator).to(cuda, torch.bfloat16)
    last = PagedKV.from_contiguous(
        tail[0][None].transpose(1, 2), tail[1][None].transpose(1, 2), torch.full_like(lengths, 100)
    )
    expected = reference.lean_decode(q, last, plan_decode(last, HEADS, backend="portable"))
    actual = lean_decode(q, kv, plan_decode(kv, HEADS, window=100))
    assert_close(actual.out, expected.out, torch.bfloat16)
