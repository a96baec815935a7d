"""The process a user starts with `leanserve serve`: HTTP and text here, ranks as children. Imports no torch."""

import asyncio
import logging
import os
import shutil
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape

from leanserve import __version__
from leanserve.bundled import EXAMPLE_PROMPT
from leanserve.contracts.errors import ConfigError, EngineError
from leanserve.launch.access import AccessOptions
from leanserve.launch.banner import describe_engine, open_console, print_banner, show_loading
from leanserve.launch.capacity import describe_steps
from leanserve.launch.engine_group import EngineGroup
from leanserve.launch.lifeline import when_gone
from leanserve.launch.nodes import Nodes
from leanserve.launch.open_files import raise_open_files
from leanserve.launch.options import LaunchOptions
from leanserve.launch.own_address import is_loopback
from leanserve.launch.run_dir import RUN_DIR_VARIABLE, make_run_dir
from leanserve.launch.spans import open_tracing
from leanserve.launch.under_torchrun import AGENT_PID_VARIABLE, PULSE_HOST_VARIABLE
from leanserve.model.architecture import read_architecture
from leanserve.server.app import create_app
from leanserve.server.chat_template import ChatTemplate
from leanserve.server.engine_client import Recovery
from leanserve.server.http_server import bind_socket, serve_http
from leanserve.server.logs import LogFormat, LogLevel, open_access_log, open_log
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer
from leanserve.server.tool_calls import ToolFormat

__all__ = ["ServeOptions", "serve_until_stopped"]

logger = logging.getLogger("leanserve.launch")

BUNDLED_NAME = "leanserve-bundled"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `leanserve serve` was asked for."""

    launch: LaunchOptions
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    insecure: bool = False
    """Listen beyond this machine although nobody has to show a key."""
    access: AccessOptions = field(default_factory=AccessOptions)
    max_live_requests: int = 4096
    max_live_prompt_tokens: int = 1 << 26
    max_body_bytes: int = 16 << 20
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    """json: no banner and no progress bar, but one event with the same facts."""
    access_log: str | None = None
    """A file, or - for standard error."""
    otlp_endpoint: str | None = None
    """Where spans go; None: where OpenTelemetry's own variables say, or nowhere."""
    metrics_compat: bool = False
    tool_format: ToolFormat | None = None
    """None: as the chat template says."""
    nodes: Nodes = field(default_factory=Nodes)
    recovery: Recovery = field(default_factory=lambda: Recovery(max_restarts=5))
    drain_timeout_s: float = 30.0
    """After Ctrl-C or SIGTERM, how long live requests may go on before they end with an error."""

    def __post_init__(self) -> None:
        if not (self.insecure or self.access.has_keys or is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and this server asks nobody for a key; give "
                "keys with --api-key-file, use 127.0.0.1 behind a proxy that asks, or add --insecure"
            )

    def server_settings(self) -> ServerSettings:
        """Raises: ConfigError for keys that cannot be read or used, or a setting out of range."""
        return ServerSettings(
            model_names=(self.model_name,),
            max_body_bytes=self.max_body_bytes,
            max_live_requests=self.max_live_requests,
            max_live_prompt_tokens=self.max_live_prompt_tokens,
            queue_timeout_s=self.queue_timeout_s,
            request_timeout_s=self.request_timeout_s,
            key_digests=self.access.digests(),
            max_requests_per_key=self.access.max_requests_per_key,
            cors_origins=self.access.cors_origins,
            metrics_compat=self.metrics_compat,
            tool_format=self.tool_format,
        )

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.launch.model or BUNDLED_NAME


def serve_until_stopped(options: ServeOptions) -> int:
    """Serve until a signal or a failure. Returns the process's exit code.

    Raises:
        ConfigError, ModelError: before anything was started.
    """
    open_log(options.log_level, options.log_format)
    if options.nodes.rank > 0:
        return _run_ranks_only(options)
    raise_open_files()
    console = open_console(quiet=options.log_format == "json")
    settings = options.server_settings()
    if options.access_log is not None:
        open_access_log(options.access_log)
    tracing = open_tracing(options.otlp_endpoint)
    listener = bind_socket(options.host, options.port)
    model_dir = options.launch.find_model()
    architecture = read_architecture(model_dir)
    tokenizer = Tokenizer.from_dir(model_dir)
    chat_template = ChatTemplate.from_dir(model_dir)
    config = options.launch.engine_config(model_dir)
    agent_pid = os.environ.get(AGENT_PID_VARIABLE)
    if agent_pid is None:
        num_ranks, unused_gpu = options.launch.count_ranks()
        run_dir = make_run_dir()
    else:
        num_ranks, unused_gpu = None, None
        run_dir = Path(os.environ[RUN_DIR_VARIABLE])
        when_gone(int(agent_pid), lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        console.print(f"[bold]LeanServe {__version__}[/]  {options.model_name}  ({architecture.describe()})")
        for note in architecture.notes:
            console.print(f"Note: {escape(note)}")
        if unused_gpu is not None:
            console.print(f"No GPU is used: {unused_gpu}")
        group = EngineGroup(
            config,
            num_ranks=num_ranks,
            run_dir=run_dir,
            nodes=options.nodes,
            recovery=options.recovery,
            pulse_host=os.environ.get(PULSE_HOST_VARIABLE),
        )
        app = create_app(group.client, tokenizer, settings, chat_template, tracing)
        steps = describe_steps(config.batch)
        return asyncio.run(_serve(group, app, listener, options, console, steps, has_text=tokenizer is not None))
    finally:
        listener.close()
        shutil.rmtree(run_dir, ignore_errors=True)  # the group does it, where one came to be
        if tracing is not None:
            tracing.close()


def _run_ranks_only(options: ServeOptions) -> int:
    """On a machine without front end: this process is torchrun's agent."""
    from leanserve.launch.agent import run_agent

    num_ranks, _ = options.launch.count_ranks()
    return run_agent(num_ranks, options.nodes)


async def _serve(
    group: EngineGroup,
    app: FastAPI,
    listener: socket.socket,
    options: ServeOptions,
    console: Console,
    steps: str,
    *,
    has_text: bool,
) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        what = "does not wait for live requests any longer" if stop.is_set() else "drains"
        live, limit_s = group.client.live_requests, options.drain_timeout_s
        extra = {"event": "draining", "live_requests": live}
        logger.info("a signal came: the server %s (%d live, limit %g s)", what, live, limit_s, extra=extra)
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a closed terminal ends it in order; nohup keeps it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    http = asyncio.create_task(
        serve_http(app, listener, stop=stop, hurry=hurry, grace_s=options.drain_timeout_s), name="http"
    )
    exit_code = 0
    try:
        await group.start()
        ready = asyncio.create_task(show_loading(group.client, console), name="loading")
        await asyncio.wait({ready, http}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            example = EXAMPLE_PROMPT if has_text else [1, 2, 3]
            url = _url(listener, options.host)
            facts = {**describe_engine(ready.result()), "steps": steps}
            print_banner(console, facts, url, example)
            extra = {"event": "ready", "url": url, **facts}
            logger.info("ready at %s: %s", url, options.model_name, extra=extra)
            failed = asyncio.create_task(group.client.engine.wait_failed(), name="engine failure")
            await asyncio.wait({failed, http}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done() and not stop.is_set():
                raise EngineError(failed.result())
        else:
            ready.cancel()
    except EngineError as error:
        logger.error("the server ends: %s", error, extra={"event": "server_failed"})
        exit_code = 1
    finally:
        stop.set()
        try:
            await http
        finally:
            await group.close()
    return exit_code


def _url(listener: socket.socket, host: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
