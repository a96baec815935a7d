"""Chat templates: those of the hub give what transformers gives; hostile ones get nothing and hold nobody up."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from leanserve.contracts.errors import CheckpointError, RequestError
from leanserve.server.chat_template import ChatTemplate
from server.chat_templates import CHATML, HERMES, LLAMA3, MISTRAL
from server.front_end import run

USER = {"role": "user", "content": "Where is the key? <é😀>"}
TALK = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "In the  "}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"n": {}}}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered(template: str, *orders: dict[str, Any]) -> list[str]:
    texts: list[str] = []

    async def scenario() -> None:
        chat = ChatTemplate({"default": template}, TOKENS)
        try:
            for order in orders:
                texts.append(await chat.render(**order))
        finally:
            await chat.close()

    run(scenario())
    return texts


def test_a_process_that_died_idle_costs_no_request() -> None:
    async def scenario() -> None:
        chat = ChatTemplate({"default": "{{ messages[0].content }}"}, TOKENS)
        try:
            for _ in range(2):
                assert await chat.render([USER]) == USER["content"]
                process = chat._sidecar._process  # pyright: ignore[reportPrivateUsage]
                assert process is not None
                process.kill()
                await process.wait()
        finally:
            await chat.close()

    run(scenario())


@pytest.mark.parametrize("template", [CHATML, HERMES, LLAMA3, MISTRAL], ids=["chatml", "hermes", "llama3", "mistral"])
def test_templates_give_what_transformers_gives(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def theirs(**order: Any) -> str:
        messages = order.pop("messages")
        texts, _ = render_jinja_template(conversations=[messages], chat_template=template, **TOKENS, **order)
        return texts[0]

    orders = [
        {"messages": TALK[:2]},
        {"messages": [USER], "add_generation_prompt": False},
        {"messages": [USER], "tools": TOOLS},
    ]
    expected = [theirs(**{"add_generation_prompt": True, **order}) for order in orders]
    assert rendered(template, *orders) == expected


def test_a_message_can_be_continued() -> None:
    [text] = rendered(CHATML, {"messages": TALK, "add_generation_prompt": False, "continue_final_message": True})
    assert text.endswith("<|im_start|>assistant\nIn the  ")


def test_variables_reach_the_template_and_generation_marks_do_nothing() -> None:
    template = (
        "{% generation %}{{ enable_thinking }}{% endgeneration %}{{ bos_token }}{{ messages[0].content | tojson }}"
    )
    [text] = rendered(template, {"messages": [USER], "variables": {"enable_thinking": False}})
    assert text == "False<s>" + json.dumps(USER["content"], ensure_ascii=False)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined|access"),
        ("{{ raise_exception.__globals__['os'].system('touch /tmp/owned') }}", "unsafe|undefined|access"),
        ("{{ cycler.__init__.__globals__['os'] }}", "unsafe|undefined|access"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% include 'tokenizer.json' %}", "loader"),
        ("{{ lipsum }}{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ open('/etc/passwd') }}", "undefined"),
        ("{% for x in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{{ 'x' * 10**12 }}", "memory|Memory"),
        ("{% for x in range(99999) %}{{ 'y' * 9999 }}{% endfor %}", "longer than|memory"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.5 s"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "[Rr]ecursion"),
        ("{{ unclosed", "unexpected|expected"),
    ],
)
def test_a_hostile_template_gets_nothing_and_holds_nobody_up(template: str, says: str) -> None:
    async def scenario() -> None:
        chat = ChatTemplate({"default": template}, TOKENS, cpu_s=0.5)
        rounds = 0

        async def watch() -> None:
            nonlocal rounds
            while True:
                await asyncio.sleep(0.001)
                rounds += 1

        began = time.perf_counter()
        watching = asyncio.create_task(watch())
        try:
            with pytest.raises(RequestError, match=says) as caught:
                await chat.render([USER])
            assert caught.value.code == "chat_template"
            assert len(str(caught.value)) < 500
        finally:
            watching.cancel()
            await chat.close()
        assert rounds > 10 * (time.perf_counter() - began) - 1, "the loop came round ten times a second at the least"

    run(scenario())
    assert not Path("/tmp/owned").exists()


def test_what_the_sandbox_hides_is_nothing_to_print() -> None:
    template = "{{ messages.__class__ }}{{ '{0.__class__}'.format(messages) }}|{{ self.__init__ }}{{ lipsum }}"
    assert rendered(template, {"messages": [USER]}) == ["|"]


def test_the_next_conversation_gets_a_new_process() -> None:
    async def scenario() -> None:
        template = "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        chat = ChatTemplate({"default": template + "{% endfor %}{% endfor %}{% endif %}fine"}, {}, cpu_s=0.5)
        try:
            with pytest.raises(RequestError, match="longer than"):
                await chat.render([{"role": "user", "content": "loop"}])
            assert await chat.render([USER]) == "fine"
            rendering = asyncio.create_task(chat.render([USER]))
            await asyncio.sleep(0)
            rendering.cancel()
            await asyncio.gather(rendering, return_exceptions=True)
            assert await chat.render([USER]) == "fine"
        finally:
            await chat.close()

    run(scenario())


def test_files(tmp_path: Path) -> None:
    def write(**config: Any) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    assert ChatTemplate.from_dir(tmp_path) is None
    write(chat_template=None)
    assert ChatTemplate.from_dir(tmp_path) is None
    write(chat_template="{{ bos_token }}", bos_token={"content": "<s>", "special": True}, eos_token=None)
    template = ChatTemplate.from_dir(tmp_path)
    assert template is not None
    assert template.templates == {"default": "{{ bos_token }}"}
    write(chat_template=[{"name": "default", "template": "a"}, {"name": "tool_use", "template": "tools {{ tools }}"}])
    template = ChatTemplate.from_dir(tmp_path)
    assert template is not None
    assert template.knows_tools
    (tmp_path / "chat_template.jinja").write_text("from the file")
    template = ChatTemplate.from_dir(tmp_path)
    assert template is not None
    assert template.templates["default"] == "from the file"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate.from_dir(tmp_path)
