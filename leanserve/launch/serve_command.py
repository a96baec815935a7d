"""The command line of `leanserve serve`. What is heavy is imported when it runs."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from leanserve.launch.configured_command import use_config_file
from leanserve.launch.model_options import (
    AttentionChoice,
    AttentionOption,
    CommChoice,
    CommOption,
    DeviceChoice,
    DeviceOption,
    DType,
    DTypeChoice,
    EnforceEager,
    KvMemory,
    LongPrefillTokens,
    MaxBatchTokens,
    MaxContext,
    MaxSequences,
    PageTokens,
    PrefixCache,
    Ranks,
    WeightsChoice,
    WeightsOption,
    count_or_auto,
    size_or_auto,
    tokens_or_auto,
)

__all__ = ["HTTP", "serve"]

HTTP, ACCESS, LIMITS, SIGHT = "HTTP", "Who may ask", "Limits", "What can be seen"
FAILURES, NODES = "Failures and the end", "Several machines"


class LogLevelChoice(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormatChoice(StrEnum):
    text = "text"
    json = "json"


class MetricsChoice(StrEnum):
    none = "none"
    vllm = "vllm"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            envvar="LEANSERVE_MODEL",
            help="A checkpoint directory or a hub id. Default: the bundled model.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="YAML with any of these options, such as port: 8001.",
            callback=use_config_file,
            is_eager=True,
            dir_okay=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="To listen on.", rich_help_panel=HTTP)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.", rich_help_panel=HTTP)
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What clients call the model. Default: as given.", rich_help_panel=HTTP),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="LEANSERVE_API_KEYS",
            help="A key that lets a client in. Repeatable. Safer in LEANSERVE_API_KEYS or a file.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line.", rich_help_panel=ACCESS)
    ] = None,
    tool_format: Annotated[
        str,
        typer.Option(
            metavar="auto | hermes | llama3 | mistral",
            help="How the model writes function calls. auto: as its chat template says.",
            rich_help_panel=HTTP,
        ),
    ] = "auto",
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine without any key.", rich_help_panel=ACCESS),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="A web site whose pages may ask, or *. Repeatable.", rich_help_panel=ACCESS
        ),
    ] = None,
    max_requests_per_key: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Requests of one key in flight. Default: no limit.", rich_help_panel=LIMITS
        ),
    ] = None,
    max_live_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts waiting or running; more get 503.", rich_help_panel=LIMITS)
    ] = 4096,
    max_live_prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens in those prompts together.", rich_help_panel=LIMITS)
    ] = 1 << 26,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Longest request body.", rich_help_panel=LIMITS)
    ] = "16MiB",
    log_level: Annotated[
        LogLevelChoice,
        typer.Option(
            metavar="debug | info | warning | error", help="debug tells of every request.", rich_help_panel=SIGHT
        ),
    ] = LogLevelChoice.info,
    log_format: Annotated[
        LogFormatChoice,
        typer.Option(help="json: one object for each event, on stderr, and no banner.", rich_help_panel=SIGHT),
    ] = LogFormatChoice.text,
    access_log: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-", help="A JSON line for each request, without prompts; - is stderr.", rich_help_panel=SIGHT
        ),
    ] = None,
    metrics_compat: Annotated[
        MetricsChoice,
        typer.Option(help="vllm: /metrics has vLLM's names too, for its dashboards.", rich_help_panel=SIGHT),
    ] = MetricsChoice.none,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A collector for OpenTelemetry spans, such as http://127.0.0.1:4318. Needs leanserve\\[otel]. "
            "Default: as OTEL_... variables say, or none.",
            rich_help_panel=SIGHT,
        ),
    ] = None,
    ranks: Ranks = "auto",
    device: DeviceOption = DeviceChoice.auto,
    comm: CommOption = CommChoice.auto,
    attention: AttentionOption = AttentionChoice.auto,
    enforce_eager: EnforceEager = False,
    weights: WeightsOption = WeightsChoice.auto,
    dtype: DType = DTypeChoice.auto,
    page_tokens: PageTokens = 64,
    max_context_tokens: MaxContext = "auto",
    kv_memory: KvMemory = "auto",
    prefix_cache: PrefixCache = True,
    max_batch_tokens: MaxBatchTokens = "auto",
    max_sequences: MaxSequences = 256,
    long_prefill_tokens: LongPrefillTokens = "auto",
    step_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="A rank whose step takes longer is taken for dead.", rich_help_panel=FAILURES
        ),
    ] = 120.0,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Of the ranks, within ten minutes; then give up.", rich_help_panel=FAILURES
        ),
    ] = 5,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Requests go on after a restart, in the same stream; or they end with an error.",
            rich_help_panel=FAILURES,
        ),
    ] = True,
    drain_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="Time to finish for live requests after SIGTERM.", rich_help_panel=FAILURES
        ),
    ] = 30.0,
    queue_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Answer 408 to a request that has not begun.", rich_help_panel=LIMITS),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Stop a request that has not ended.", rich_help_panel=LIMITS),
    ] = None,
    nnodes: Annotated[int, typer.Option(metavar="N", help="Machines that take part.", rich_help_panel=NODES)] = 1,
    node_rank: Annotated[
        int, typer.Option(metavar="N", help="This machine among them; 0 has the HTTP port.", rich_help_panel=NODES)
    ] = 0,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="On machine 0, where they meet.", rich_help_panel=NODES)
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API.

    With no MODEL the small bundled one is served: no download, no GPU needed. Under torchrun
    (`torchrun --standalone --nproc-per-node 3 -m leanserve serve ...`) its processes are the ranks.

    Every option can also stand in the environment, --port as LEANSERVE_PORT, or in the file of --config.
    """
    from leanserve.launch.access import AccessOptions
    from leanserve.launch.front_end import ServeOptions, serve_until_stopped
    from leanserve.launch.nodes import Nodes
    from leanserve.launch.options import LaunchOptions, parse_bytes
    from leanserve.launch.under_torchrun import serve_under_torchrun, started_by_torchrun
    from leanserve.server.engine_client import Recovery
    from leanserve.server.logs import open_log
    from leanserve.server.tool_calls import tool_format as find_tool_format

    if started_by_torchrun():
        open_log(log_level.value, log_format.value)
        sys.exit(serve_under_torchrun(sys.argv[1:]))
    options = ServeOptions(
        host=host,
        port=port,
        served_model_name=served_model_name,
        insecure=insecure,
        nodes=Nodes(count=nnodes, rank=node_rank, endpoint=rdzv_endpoint),
        recovery=Recovery(max_restarts=max_restarts, resume=resume),
        drain_timeout_s=drain_timeout,
        queue_timeout_s=queue_timeout,
        request_timeout_s=request_timeout,
        access=AccessOptions(
            keys=tuple(api_key or ()),
            key_file=api_key_file,
            max_requests_per_key=max_requests_per_key,
            cors_origins=tuple(cors_origin or ()),
        ),
        max_live_requests=max_live_requests,
        max_live_prompt_tokens=max_live_prompt_tokens,
        max_body_bytes=parse_bytes(max_body),
        log_level=log_level.value,
        log_format=log_format.value,
        access_log=access_log,
        otlp_endpoint=otlp_endpoint,
        metrics_compat=metrics_compat is MetricsChoice.vllm,
        tool_format=None if tool_format == "auto" else find_tool_format(tool_format),
        launch=LaunchOptions(
            model=model,
            ranks=count_or_auto("--ranks", ranks),
            dtype=dtype.value,
            device=device.value,
            comm=comm.value,
            attention=attention.value,
            enforce_eager=enforce_eager,
            weights=weights.value,
            page_tokens=page_tokens,
            kv_memory=size_or_auto(kv_memory),
            max_context_tokens=tokens_or_auto("--max-context-tokens", max_context_tokens),
            prefix_cache=prefix_cache,
            max_batch_tokens=tokens_or_auto("--max-batch-tokens", max_batch_tokens),
            max_sequences=max_sequences,
            long_prefill_tokens=tokens_or_auto("--long-prefill-tokens", long_prefill_tokens),
            step_timeout_s=step_timeout,
        ),
    )
    sys.exit(serve_until_stopped(options))
