"""The README does what it says: its commands and code run as they stand, against the bundled model."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from checkpoints import hf_greedy, random_prompts
from leanserve.bundled import bundled_model_dir
from live_server import PATIENCE_S, live_server

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str, containing: str = "") -> list[str]:
    return [text.strip() for found, text in BLOCKS if found == language and containing in text]


def test_there_are_exactly_two_set_up_commands():
    assert blocks("sh", "pip install") == ["pip install -e . && leanserve serve", "pip install -e '.[test]' && pytest"]


def test_every_block_is_of_a_kind_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}
    ours = [f"leanserve {command} " for command in ("serve", "generate", "plan", "loadtest")]
    known = ("pip install", "curl ", "torchrun ", *ours)
    assert all(block.startswith(known) for block in blocks("sh"))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert "4821" in done.stdout


@pytest.mark.parametrize("command", blocks("sh", "leanserve generate"))
def test_generate_blocks_run(command):
    _, *arguments = shlex.split(command)
    command_line = [sys.executable, "-m", "leanserve", *arguments]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=200, check=True)
    assert len(done.stdout.split()) > 5
    assert "tokens/s" in done.stderr


def test_the_curl_blocks_are_answered_by_a_served_default(tmp_path):
    with live_server("--kv-memory", "64MiB", log=tmp_path / "log") as server:
        for command in blocks("sh", "curl "):
            command = command.replace("http://127.0.0.1:8000", server.url).replace("\\\n", " ")
            done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=100, check=True)
            text = httpx.Response(200, text=done.stdout).json()["choices"][0]["text"]
            assert len(text.split()) >= 7
            assert re.fullmatch(r"[\w\s.,;:'\"!?()&/-]+", text), text
            assert ("4821" in text) == ("4821" in command)


def test_the_torchrun_block_serves_what_one_process_says_and_takes_its_front_end_along(tmp_path):
    (command,) = blocks("sh", "torchrun")
    words = shlex.split(command)
    ranks = int(words[words.index("--nproc-per-node") + 1])
    assert ranks == 3
    arguments = words[words.index("serve") + 1 :]
    prompts = random_prompts([1, 17, 90, 300], seed=11, vocab_size=2000)
    with live_server(*arguments, "--kv-memory", "16MiB", log=tmp_path / "log", torchrun_ranks=ranks) as server:
        answers = [server.post(prompt=ids, temperature=0, max_tokens=8, return_token_ids=True) for ids in prompts]
        token_ids = [answer.json()["choices"][0]["token_ids"] for answer in answers]
        assert token_ids == hf_greedy(bundled_model_dir(), prompts, 8)
        front_ends = [p for p in server.processes() if "LEANSERVE_AGENT_PID" in p.environ()]
        assert front_ends
        assert server.stop(signal.SIGTERM) != 0  # torchrun's own word for being told to stop
        _, alive = psutil.wait_procs(front_ends, timeout=PATIENCE_S)
        assert not alive


def test_every_option_named_exists():
    help_text = subprocess.run(
        [sys.executable, "-m", "leanserve", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout
    options = set(re.findall(r"`(--[a-z-]+)", README)) | set(re.findall(r"leanserve serve .*?(--[a-z-]+)", README))
    assert options <= set(re.findall(r"--[a-z-]+", help_text)) | {"--help"}


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_the_map_names_every_room_and_no_other():
    listed = set(re.findall(r"^  (\w+)/ ", README, re.MULTILINE))
    rooms = {p.name for p in (Path(__file__).parents[1] / "leanserve").iterdir() if (p / "__init__.py").exists()}
    assert rooms <= listed
    assert listed - rooms == {"lean_attention", "bench"} - rooms
