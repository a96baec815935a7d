"""What every route shares: the engine, the prompts' way to it, the settings, and what may still come in."""

import asyncio
import time

from leanserve.contracts.errors import OverloadedError, RequestError
from leanserve.contracts.messages import EngineInfo
from leanserve.server.chat_request import Conversation
from leanserve.server.chat_template import ChatTemplate
from leanserve.server.engine_client import EngineClient
from leanserve.server.errors import NotFoundError
from leanserve.server.messages import Message, template_messages
from leanserve.server.metrics import HttpCounts, Metrics
from leanserve.server.page import Page
from leanserve.server.prompt_intake import PromptIntake
from leanserve.server.settings import ServerSettings
from leanserve.server.tokenizer import Tokenizer
from leanserve.server.tool_calls import ToolFormat, find_tool_format

__all__ = ["Serving"]


class Serving:
    """One model behind one HTTP face. Belongs to the event loop it serves in."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        settings: ServerSettings,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.client = client
        self.prompts = PromptIntake(tokenizer, settings)
        self.chat_template = chat_template
        self.tool_format: ToolFormat | None = settings.tool_format
        if self.tool_format is None and chat_template is not None:
            self.tool_format = find_tool_format("".join(chat_template.templates.values()))
        self.settings = settings
        self.created = int(time.time())
        self.is_draining = False
        self.page = Page()
        self.counts = HttpCounts()
        self.metrics = Metrics(client, self.counts, self.model_name, compatible=settings.metrics_compat)

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    def check_serving(self) -> None:
        """Raises: OverloadedError while the server loads or drains, EngineError when the engine is gone."""
        if self.is_draining:
            raise OverloadedError("the server is shutting down; try another, or later", retry_after_s=5)
        self.client.engine.check_ready()

    def admit(self, num_prompts: int, num_tokens: int = 0) -> EngineInfo:
        """The engine's facts, if so many prompts, of so many tokens together, may come in now.

        Raises:
            OverloadedError: the server is loading, draining or full.
            EngineError: the engine is gone.
        """
        self.check_serving()
        if self.client.live_requests + num_prompts > self.settings.max_live_requests:
            raise OverloadedError(
                f"{self.client.live_requests} prompts are waiting or running and {num_prompts} more came; "
                f"the limit is {self.settings.max_live_requests}, try again soon"
            )
        queued = self.client.live_prompt_tokens
        if queued and queued + num_tokens > self.settings.max_live_prompt_tokens:
            raise OverloadedError(
                f"prompts of {queued} tokens are waiting or running and {num_tokens} more came; "
                f"the limit is {self.settings.max_live_prompt_tokens}, try again soon"
            )
        info = self.client.engine.info
        assert info is not None
        return info

    def check_model(self, name: str | None) -> None:
        """Raises: NotFoundError for a model that is not served here."""
        if name is not None and name not in self.settings.model_names:
            served = ", ".join(self.settings.model_names)
            raise NotFoundError(
                f"the model {name[:200]!r} is not served here; this server has {served}",
                param="model",
                code="model_not_found",
            )

    async def render(self, messages: list[Message], request: Conversation) -> str:
        """The text of a conversation.

        Raises:
            RequestError: the model has no template or no tokenizer, or cannot take these messages.
        """
        self.prompts.text_tokenizer()
        template = self.chat_template
        if template is None:
            raise RequestError(
                "this model has no chat template (its checkpoint has no chat_template.jinja, and its "
                "tokenizer_config.json none either); use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        if request.tools and not template.knows_tools:
            raise RequestError(
                "this model's chat template says nothing of tools; leave them out", param="tools", code="unsupported"
            )
        return await template.render(
            template_messages(messages, knows_developers=template.knows_developers),
            tools=[tool.model_dump(exclude_none=True) for tool in request.tools] if request.tools else None,
            add_generation_prompt=request.prompts_for_more,
            continue_final_message=bool(request.continue_final_message),
            variables=request.chat_template_kwargs,
        )

    async def start(self) -> None:
        """Do beforehand what the first request would wait for."""
        if self.chat_template is not None:
            await self.chat_template.start()

    async def close(self) -> None:
        """Let go of what outlives a request."""
        if self.chat_template is not None:
            await self.chat_template.close()
        await self.prompts.close()

    async def drain(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Let nobody in, give live requests `grace_s` to finish, or until `hurry`, then end the rest with an error.

        A stream whose last token has come is live until its client has taken it."""
        self.is_draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while self.client.live_requests or self.counts.open_streams:
            if loop.time() >= deadline or hurry.is_set():
                break
            await asyncio.sleep(0.02)
        self.client.end_all("the server is shutting down")
