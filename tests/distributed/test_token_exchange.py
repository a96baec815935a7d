"""The exchanges of a step on 3 real ranks, beside the same products of whole matrices in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from closeness import assert_close
from leanserve.distributed.ranks import Ranks
from leanserve.distributed.token_exchange import TokenExchange, TokenSpread, columns_to_rank_0
from warm_start import warm_start_method

SIZE = 3
HIDDEN = 10
WIDTHS = {"uneven": (3, 0, 2), "even": (4, 4, 4)}
SPREADS = {
    "decode": TokenSpread(4, (0, 0, 0)),
    "mixed": TokenSpread(2, (3, 0, 5)),
    "prefill": TokenSpread(0, (1, 4, 2)),
    "mixed, one owner": TokenSpread(1, (0, 6, 0)),
}


def tokens_of(spread: TokenSpread) -> tuple[Tensor, list[Tensor]]:
    """All tokens [M, C], and the rows among them of each rank."""
    all_MC = torch.randn(spread.num_shared + sum(spread.own_per_rank), HIDDEN)
    shared, *own = torch.arange(len(all_MC)).split((spread.num_shared, *spread.own_per_rank))
    return all_MC, [torch.cat([shared, rows]) for rows in own]


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", SIZE)
    ranks = Ranks.join(rank=rank, size=SIZE, store=store, backend="gloo", device=torch.device("cpu"))
    torch.manual_seed(0)  # the same numbers on every rank
    results = {}
    for spread_name, spread in SPREADS.items():
        exchange = TokenExchange(ranks, spread)
        all_MC, rows = tokens_of(spread)
        mine_NC = all_MC[rows[rank]]
        torch.testing.assert_close(exchange.all_tokens(mine_NC), all_MC, rtol=0, atol=0)
        torch.testing.assert_close(exchange.all_tokens(rows[rank]), torch.arange(len(all_MC)), rtol=0, atol=0)
        for widths_name, widths in WIDTHS.items():
            weight_CJ = torch.randn(HIDDEN, sum(widths))
            y_MJ = all_MC @ weight_CJ
            part_MJ = y_MJ.split(widths, dim=1)[rank]
            y_NJ = exchange.my_tokens(part_MJ, widths)
            torch.testing.assert_close(y_NJ, y_MJ[rows[rank]], rtol=0, atol=0)
            torch.testing.assert_close(exchange.my_columns(y_NJ, widths), part_MJ, rtol=0, atol=0)
            whole_MJ = columns_to_rank_0(part_MJ, widths, ranks)
            if rank == 0:
                torch.testing.assert_close(whole_MJ, y_MJ, rtol=0, atol=0)
            else:
                assert whole_MJ is None

            back_JC = torch.randn(sum(widths), HIDDEN)
            summed_NC = exchange.summed(part_MJ @ back_JC.split(widths)[rank])
            assert_close(summed_NC, (y_MJ @ back_JC)[rows[rank]], torch.float32)
            results[f"{spread_name}, {widths_name}"] = summed_NC[: spread.num_shared].clone()
    save_file(results, f"{folder}/{rank}")
    ranks.leave()


def test_what_arrives_and_that_shared_tokens_stay_equal(tmp_path: Path) -> None:
    mp.start_processes(run, (str(tmp_path),), nprocs=SIZE, start_method=warm_start_method())
    first, *others = [load_file(tmp_path / str(rank)) for rank in range(SIZE)]
    assert len(first) == len(SPREADS) * len(WIDTHS)
    for other in others:
        for name, shared in first.items():
            assert torch.equal(other[name], shared), f"{name}: a shared token differs between ranks"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_half_precision_are_made_in_float32(dtype: torch.dtype) -> None:
    """1 + 2**-8 + 2**-8 is above 1 only where it is rounded once."""

    class EveryRankSaysTheSame(Ranks):
        def all_gather(self, mine: Tensor) -> Tensor:
            return torch.stack([torch.ones_like(mine), mine, mine])

    ranks = EveryRankSaysTheSame(rank=0, size=SIZE, device=torch.device("cpu"), group=None, stages_through_host=False)
    small = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    part = torch.full((1, 1), small, dtype=dtype)
    assert TokenExchange(ranks, TokenSpread(1, (0,) * SIZE)).summed(part).item() == 1 + 2 * small
