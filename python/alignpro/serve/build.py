"""The parts of a server from its configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.config import ModelConfig
from alignpro.config.serve import RouteConfig, ServeConfig
from alignpro.models.chat_template import today
from alignpro.models.native_model import NativeModel, load_model, reusable
from alignpro.prompter import Prompter, config_of_prompter
from alignpro.serve.app import Proxy
from alignpro.serve.audit import AuditLog
from alignpro.serve.local import LocalUpstream
from alignpro.serve.messages import Upstream
from alignpro.serve.rewriter import Rewriter
from alignpro.serve.routes import Route, Routes, mode_of
from alignpro.serve.upstream import EndpointUpstream


def build_proxy(config: ServeConfig) -> Proxy:
    """Load the models and put the parts together.

    A prompter whose base weights are those of the model that answers shares its engine. Chat
    templates tell a prompter its run's date, and the model that answers today's.

    Raises as `AuditLog`, `Prompter.from_run` and `load_model`.
    """
    audit = None if config.audit.path is None else AuditLog(config.audit)
    loaded: list[tuple[ModelConfig, NativeModel]] = []
    rewriters: dict[tuple[Path, str], Rewriter] = {}

    def rewriter_of(name: str, sampling: dict[str, Any] | None) -> Rewriter:
        run = Path(name).resolve()
        key = run, json.dumps(sampling)
        if key not in rewriters:
            made = config_of_prompter(name)
            base = made.prompter
            model = reusable(base, loaded, made.date)
            prompter = Prompter.from_run(
                name,
                threads=config.threads,
                guards=config.guards,
                sampling=sampling,
                model=model,
            )
            loaded.append((base, prompter.model))
            shown = "".join(c if c.isprintable() else "?" for c in run.name)  # in a header
            rewriters[key] = Rewriter(shown, prompter, config)
        return rewriters[key]

    def route_of(settings: RouteConfig) -> Route:
        runs = [run for run in (settings.run, settings.second_run) if run is not None]
        rewriting = [rewriter_of(run, settings.sampling) for run in runs]
        return Route(mode_of(settings.rewrite), rewriting, settings.share)

    named = {model: route_of(route) for model, route in (config.routes or {}).items()}
    routes = Routes(route_of(config), named)
    return Proxy(config, upstream_of(config, loaded), routes, audit)


def upstream_of(
    config: ServeConfig, loaded: Sequence[tuple[ModelConfig, NativeModel]] = ()
) -> Upstream:
    """What answers: the endpoint, or the model, of those that are loaded already where it can be.

    Raises ValueError where the configuration names neither; as `load_model`.
    """
    if config.upstream is not None:
        return EndpointUpstream(
            config.upstream,
            connect_seconds=config.connect_seconds,
            idle_seconds=config.idle_seconds,
        )
    if config.model is None:
        raise ValueError("upstream: expected an address, or a model in this process (model)")
    wanted = ModelConfig(config.model)
    return LocalUpstream(reusable(wanted, loaded, today()) or load_model(wanted, config.threads))
