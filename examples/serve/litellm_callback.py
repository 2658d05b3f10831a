"""A trained prompter in front of every model that LiteLLM reaches, with RUN=alignpro-run.

litellm.callbacks.append(litellm_callback.rewriting) for `acompletion` and a Router's; in LiteLLM's
own proxy, litellm_settings: {callbacks: litellm_callback.rewriting}. LiteLLM has no hook that
changes a request of the blocking `completion`.
"""

import logging
import os
from typing import Any

from litellm.integrations.custom_logger import CustomLogger
from litellm.types.utils import CallTypes

import alignpro


class Rewriting(CustomLogger):
    """The last user turn is rewritten; whatever goes wrong, the request goes out as it came."""

    def __init__(self, prompter: alignpro.Prompter, deadline: float = 0.15) -> None:
        super().__init__()
        self.prompter, self.deadline = prompter, deadline

    async def async_pre_call_deployment_hook(
        self, kwargs: dict[str, Any], call_type: CallTypes | None
    ) -> dict[str, Any] | None:
        messages = kwargs.get("messages")
        if call_type != CallTypes.acompletion or not messages or messages[-1]["role"] != "user":
            return None
        # What was said; calls of tools and their results are no part of it.
        chat = [
            {"role": m["role"], "content": m["content"]}
            for m in messages
            if m["role"] != "tool" and m.get("content")
        ]
        try:
            result = await self.prompter.arewrite(chat, deadline=self.deadline)
        except Exception as error:  # images, a chat that is too long, a prompter that was closed
            logging.warning("not rewritten: %s", error)
            return None
        if not result.applied:
            return None
        last = {**messages[-1], "content": result.messages[-1]["content"]}
        return {**kwargs, "messages": [*messages[:-1], last]}


rewriting = Rewriting(alignpro.Prompter.from_run(os.environ["RUN"], guards=alignpro.GuardConfig()))
