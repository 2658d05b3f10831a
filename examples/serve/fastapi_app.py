"""A trained prompter in a service of one's own: uvicorn fastapi_app:app, with RUN=alignpro-run."""

import os

from fastapi import FastAPI

import alignpro

prompter = alignpro.Prompter.from_run(os.environ["RUN"], guards=alignpro.GuardConfig())
app = FastAPI()


@app.post("/rewrite")
async def rewrite(messages: list[dict[str, str]]) -> dict[str, object]:
    result = await prompter.arewrite(messages, deadline=0.15)
    return {"messages": result.messages, "applied": result.applied, "reason": result.reason}
