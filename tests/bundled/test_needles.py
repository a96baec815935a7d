"""Through the HTTP server: the bundled model's answers do not depend on ranks, and are those of transformers."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from checkpoints import hf_greedy
from leanserve.bundled import bundled_model_dir
from leanserve.bundled.client import PageOwners, ask, served_model
from leanserve.bundled.corpus import make_prompt
from leanserve.bundled.demo import DemoOptions, run_demo
from leanserve.bundled.held_out import held_out
from leanserve.bundled.needles import ask_needles
from leanserve.bundled.own_server import own_server
from leanserve.contracts.errors import ConfigError, EngineError
from leanserve.launch.options import LaunchOptions
from live_server import free_port

TOKENIZER = Tokenizer.from_file(str(bundled_model_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[int, str]]:
    """Servers by their number of ranks."""
    with ExitStack() as servers, ThreadPoolExecutor() as starters:

        def start(ranks: int) -> str:
            options = LaunchOptions(ranks=ranks, device="cpu", kv_memory="16MiB")
            return servers.enter_context(own_server(options, Console(file=StringIO())))

        yield dict(zip((1, 3), starters.map(start, (1, 3)), strict=True))


def test_one_and_three_ranks_give_the_same_right_answers_at_4k_tokens(urls: dict[int, str]) -> None:
    one, three = ([*ask_needles(url, held_out(4096, 0))] for url in urls.values())
    assert one == three
    assert len(one) == 10
    assert sum(asked.right for asked in one) >= 9


def test_the_answers_are_those_of_transformers(urls: dict[int, str]) -> None:
    prompts = [make_prompt(tokens, 0.6, seed=tokens).text for tokens in (321, 1100)]
    expected = hf_greedy(bundled_model_dir(), [TOKENIZER.encode(prompt).ids for prompt in prompts], 12)
    for url in urls.values():
        for prompt, token_ids in zip(prompts, expected, strict=True):
            assert list(ask(url, prompt, 12).token_ids) == token_ids


@pytest.mark.parametrize("seed", [7, 8])
def test_the_demo_names_the_rank_that_holds_the_fact(
    urls: dict[int, str], seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    right = run_demo(DemoOptions(url=urls[3], tokens=1000, depth=0.7, seed=seed, ranks=2))
    shown = capsys.readouterr().out
    prompt = make_prompt(1000, 0.7, seed)
    assert f"tokens {prompt.fact_token} to {prompt.fact_end - 1}, " in shown
    # Alone on an idle server: the first page is rank 0's, and the others are dealt in turn.
    pages = range(prompt.fact_token // 64, (prompt.fact_end - 1) // 64 + 1)
    held = " and ".join(str(page % 3) for page in pages)
    assert f"rank{'s' if len(pages) > 1 else ''} {held}; pages of 64 tokens by rank: 6, 5, 5" in shown
    assert right == ("Right: the log says" in shown) != ("Wrong: the log says" in shown)
    assert f"the log says {prompt.answer}." in shown
    assert right == (f"{prompt.answer}." in shown.split("answer ")[1].split("\n")[0])


def test_a_prompt_that_was_asked_before_is_told_to_be_cached(urls: dict[int, str]) -> None:
    prompt = make_prompt(700, 0.5, seed=3).text
    first, again = ask(urls[3], prompt, 8), ask(urls[3], prompt, 8)
    assert first.cached_tokens == 0
    assert again.cached_tokens >= 640, "ten whole pages"
    assert first.token_ids == again.token_ids
    assert first.page_owners is not None
    assert again.page_owners is not None
    assert first.page_owners.ranks[:10] == again.page_owners.ranks[:10], "cached pages keep their owner"


def test_owners_of_a_sentence_that_lies_on_two_pages() -> None:
    owners = PageOwners(64, (2, 0, 1, 2))
    assert owners.of(0, 64) == (2,)
    assert owners.of(120, 130) == (0, 1)
    assert owners.of(63, 193) == (2, 0, 1)


def test_what_a_server_refuses_is_told(urls: dict[int, str]) -> None:
    with pytest.raises(EngineError, match=r"answered 400: .*max_tokens is 99999999"):
        ask(urls[1], "The sea", 99_999_999)


def test_nobody_and_strangers_are_told_apart() -> None:
    holder = socket.socket()  # nobody else takes the port, and nobody listens there
    holder.bind(("127.0.0.1", 0))
    free = f"http://127.0.0.1:{holder.getsockname()[1]}"
    assert served_model(free) is None
    with pytest.raises(ConfigError, match="http://127"):
        served_model("ftp://127.0.0.1")
    with pytest.raises(ConfigError, match="start one there"):
        run_demo(DemoOptions(url="http://192.0.2.1:9", tokens=600, depth=0.5, seed=1, ranks=2))
    with pytest.raises(ConfigError, match="at least"):
        run_demo(DemoOptions(url=free, tokens=60, depth=0.5, seed=1, ranks=2))
    with pytest.raises(ConfigError, match="depth is 2"):
        run_demo(DemoOptions(url=free, tokens=600, depth=2, seed=1, ranks=2))
    holder.close()


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "leanserve", "demo", "--url", url, "--tokens", "60000"]
    # A test run in the background of a shell ignores Ctrl-C, and so would its children.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    assert demo.stdout is not None
    header, question = demo.stdout.readline(), demo.stdout.readline()
    assert "60,000 tokens" in header
    assert "question" in question
    processes = psutil.Process(demo.pid).children(recursive=True)
    assert len(processes) >= 3, "torchrun's agent and two ranks"
    run_dirs = {Path(directory) for p in processes if (directory := p.environ().get("LEANSERVE_RUN_DIR"))}
    assert served_model(url) is not None
    demo.send_signal(signal.SIGINT)
    output, errors = demo.communicate(timeout=30)
    assert "\n  answer" not in output
    assert "Traceback" not in errors
    assert demo.returncode not in (0, None)
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive
    assert len(run_dirs) == 1
    assert not run_dirs.pop().exists()
    assert served_model(url) is None
