"""The parts of a server from its configuration."""

from __future__ import annotations

from pathlib import Path

from alignpro.config import ModelConfig
from alignpro.config.serve import ServeConfig
from alignpro.models.native_model import NativeModel, load_model, reusable
from alignpro.prompter import Prompter, config_of_prompter
from alignpro.serve.app import Proxy
from alignpro.serve.local import LocalUpstream
from alignpro.serve.messages import Upstream
from alignpro.serve.rewriter import Rewriter
from alignpro.serve.upstream import EndpointUpstream


def build_proxy(config: ServeConfig) -> Proxy:
    """Load the models and put the parts together.

    A prompter whose base weights are those of the model that answers shares its engine.

    Raises as `Prompter.from_run` and `load_model`.
    """
    rewriter, loaded = None, []
    if config.run is not None:
        run = Path(config.run)
        prompter = Prompter.from_run(run, threads=config.threads, guards=config.guards)
        rewriter = Rewriter(run.resolve().name, prompter, config)
        loaded.append((config_of_prompter(run).prompter, prompter.model))
    return Proxy(config, _upstream(config, loaded), rewriter)


def _upstream(config: ServeConfig, loaded: list[tuple[ModelConfig, NativeModel]]) -> Upstream:
    if config.upstream is not None:
        return EndpointUpstream(
            config.upstream,
            connect_seconds=config.connect_seconds,
            idle_seconds=config.idle_seconds,
        )
    if config.model is None:
        raise ValueError("upstream: expected an address, or a model in this process (model)")
    wanted = ModelConfig(config.model)
    return LocalUpstream(reusable(wanted, loaded) or load_model(wanted, config.threads))
