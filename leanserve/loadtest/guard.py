"""Reasons not to trust a run: this client was the bottleneck, or something flattered the server."""

from leanserve.loadtest.client_load import ClientLoad
from leanserve.loadtest.correctness import Correctness
from leanserve.loadtest.measures import Measures, distribution
from leanserve.loadtest.server_view import ServerView

__all__ = ["warnings_of"]

MAX_LAG_MS = 5.0
"""Of the 99th percentile, or a tenth of the median gap between tokens if that is more."""
MAX_CPU_SHARE = 0.8


def warnings_of(
    measures: Measures,
    client: ClientLoad,
    server: ServerView | None,
    correctness: Correctness,
    *,
    shares_prompts: bool,
    interrupted: bool,
) -> list[str]:
    """What a reader of the figures must know, most important first; each with its numbers."""
    found: list[str] = []
    if interrupted:
        found.append("the run was interrupted: figures are of the requests that had ended")
    if measures.errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in measures.errors_by_kind.items())
        found.append(f"{measures.errors} of {measures.requests} requests failed ({kinds}) and are in no percentile")
    lag = distribution(client.lag_ms)
    allowed_ms = max(MAX_LAG_MS, measures.itl_ms.p50 / 10)
    if lag.p99 > allowed_ms:
        found.append(
            f"this client may be the bottleneck: its event loop lags by {lag.p99:.1f} ms at the 99th percentile "
            f"({allowed_ms:.1f} is fine); run it on an idle machine, or lower the load"
        )
    if client.cpu_share > MAX_CPU_SHARE:
        found.append(
            f"this client may be the bottleneck: it used {client.cpu_share:.0%} of a core ({MAX_CPU_SHARE:.0%} is "
            "fine); split the load between several clients"
        )
    if measures.cached_tokens and not shares_prompts:
        found.append(
            f"{measures.cached_tokens:,} of {measures.input_tokens:,} prompt tokens came from the server's prefix "
            "cache although no prompts share a beginning: an earlier run left them there; change --seed"
        )
    if measures.length_mismatches:
        found.append(
            f"{measures.length_mismatches} prompts have another length by the server's count than was asked for; "
            "figures use the server's"
        )
    if measures.short_outputs:
        found.append(f"{measures.short_outputs} answers are shorter than asked for: the model ended them")
    if measures.uncounted:
        found.append(f"{measures.uncounted} answers came without usage: their tokens are counted by chunks")
    if correctness.different:
        found.append(
            f"{len(correctness.different)} of {correctness.repeated} greedy answers differ from the same prompt alone"
        )
    if server is not None and not server.idle_at_end:
        found.append("the server still reports work or referenced pages some seconds after the last request")
    return found
