"""`alignpro serve`."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from alignpro.cli.shared import (
    Config,
    app,
    examples,
    key_values,
    needs_serve,
    one_line_errors,
    read_settings,
)


@app.command(
    epilog=examples(
        "alignpro serve --run alignpro-run --upstream http://127.0.0.1:9000/v1 --rewrite on",
        "alignpro serve --model smollm2 --run alignpro-run --port 8080",
        "alignpro serve deadline_seconds=0.1 --model smollm2 --run alignpro-run",
    )
)
@one_line_errors
def serve(
    config: Config = None,
    overrides: Annotated[list[str] | None, key_values("threads=1 or guards.language=false")] = None,
    run: Annotated[
        str | None, typer.Option(help="Run whose prompter rewrites the last user turns.")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint that answers.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Path or name of a model that answers in this process.")
    ] = None,
    rewrite: Annotated[
        str | None,
        typer.Option(help="Whether requests that do not say it are rewritten: on, off or shadow."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; the default is 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 is a free one.")] = None,
) -> None:
    """Serve an OpenAI-compatible proxy with a prompter in it.

    Requests are relayed byte for byte; where one is rewritten, its last user turn alone is another.
    """
    from alignpro.config.serve import LOOPBACK, ServeConfig

    needs_serve("serve")
    options = {"run": run, "upstream": upstream, "model": model, "host": host, "port": port}
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    given += [] if rewrite is None else [f"rewrite={rewrite}"]
    settings = read_settings(ServeConfig, config, [*(overrides or []), *given])
    from alignpro.report.progress import Bars
    from alignpro.serve.build import build_proxy
    from alignpro.serve.server import listen, run_server

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    with listen(settings) as place:
        with Bars("loading"):
            proxy = build_proxy(settings)
        where = place.getsockname()
        address = f"[{where[0]}]" if ":" in where[0] else where[0]

        def ready() -> None:
            typer.echo(f"listening on http://{address}:{where[1]}/v1")
            if settings.host not in LOOPBACK:
                typer.echo("reachable from other machines: this server asks for no key", err=True)

        run_server(proxy, settings, place, ready)
