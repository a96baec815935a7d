"""The page at `/`: nothing from elsewhere, nothing but its own script; and, in a real browser, that it works."""

import asyncio
import base64
import hashlib
import re
import shutil

import pytest

from chromium import PROGRAMS, chromium
from leanserve.server.auth import key_digests
from leanserve.server.tokenizer import Tokenizer
from server.front_end import live_server, run
from server.small_tokenizers import byte_level

KEY = "sk-page-key-0001"


def test_the_page_runs_nothing_but_its_own_script() -> None:
    async def scenario() -> None:
        async with live_server(None) as live:
            page = await live.http.get("/")
            assert page.status_code == 200
            policy = page.headers["content-security-policy"]
            [script] = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"script-src 'sha256-{digest}'" in policy
            assert "unsafe" not in policy
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)\w|https?:|//\w+\.|\son\w+=|style=""", page.text)
            assert len(page.content) < 20_000

    run(scenario())


@pytest.mark.system
def test_the_page_streams_and_takes_a_key() -> None:
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {', '.join(PROGRAMS)} is installed")

    def browse(port: int) -> None:
        with chromium(program) as page:
            page.open(f"http://127.0.0.1:{port}/")
            page.wait_for("!document.getElementById('key-box').hidden")
            page.run(f"document.getElementById('key').value = '{KEY}'")
            page.run("document.querySelector('#key-form button').click()")
            page.wait_for("document.getElementById('model').textContent === 'echo'")
            page.wait_for("/rank 0/.test(document.getElementById('ranks').textContent)")
            page.run("document.getElementById('prompt').value = 'The cat sat <b>on</b>'")
            page.run("document.getElementById('max').value = 9; document.getElementById('go').click()")
            page.wait_for("/the first after/.test(document.getElementById('stage').textContent)")
            assert page.run("document.getElementById('output').textContent").startswith("The cat")
            assert page.run("document.querySelectorAll('#output b').length") == 0
            page.wait_for("Number(document.getElementById('rate').textContent) >= 0")
            assert not [said for said in page.complaints if "Content Security Policy" in said]

    async def scenario() -> None:
        async with live_server(Tokenizer(byte_level()), settings={"key_digests": key_digests([KEY])}) as live:
            await asyncio.to_thread(browse, live.port)

    run(scenario())
