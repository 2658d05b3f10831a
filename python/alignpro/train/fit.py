"""Fitting a policy to data of one's own: the steps, and what of them a resume needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alignpro.config import PairsFitConfig, to_mapping
from alignpro.train.checkpoint import Checkpoint, check_same_run
from alignpro.train.policy import Policy, one_torch_thread
from alignpro.train.schedule import (
    apply_gradients,
    batch_indices,
    make_optimizer,
    rate_factor,
)


class Fit:
    """Steps of AdamW over rows, which are shuffled by (config.seed, epoch).

    Args:
        rows: how many there are.
        gradients: accumulates the gradient of the rows of these numbers, and gives its metrics.
        look: what the row of a step says of what is not trained on, before the step is done.
    """

    def __init__(
        self,
        policy: Policy,
        config: PairsFitConfig,
        rows: int,
        gradients: Callable[[Sequence[int]], dict[str, Any]],
        look: Callable[[int], dict[str, Any]] = lambda step: {},
    ) -> None:
        self.policy, self.config = policy, config
        self._rows, self._gradients, self._look = rows, gradients, look
        self.optimizer = make_optimizer(policy.parameters(), config)
        self.step = 0  # steps done

    def rows(self) -> Iterator[dict[str, Any]]:
        """The steps that are left: one for each row of metrics that is taken."""
        while self.step < self.config.steps:
            yield self.advance()

    def advance(self) -> dict[str, Any]:
        """Do a step, as a whole; returns its row of metrics."""
        config = self.config
        chosen = batch_indices(
            seed=config.seed,
            cursor=self.step * config.batch_size,
            count=config.batch_size,
            rows=self._rows,
        )
        self.optimizer.zero_grad(set_to_none=True)
        rate = config.learning_rate * rate_factor(config, self.step)
        with one_torch_thread():
            seen = self._look(self.step)
            started = time.perf_counter()
            metrics = self._gradients(chosen)
            (norm,) = apply_gradients({self.optimizer: rate}, max_grad_norm=config.max_grad_norm)
        self.step += 1
        return {
            "step": self.step - 1,
            **metrics,
            "grad_norm": norm,
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
            **seen,
        }

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            cursor=self.step * self.config.batch_size,
            config=to_mapping(self.config),
            weights=self.policy.weights(),
            optimizer=self.optimizer.state_dict(),
            adaptive={},
        )

    def restore(self, checkpoint: Checkpoint, same: Mapping[str, str] | None = None) -> None:
        """Go on as if it had not stopped. Raises ValueError as `check_same_run`."""
        check_same_run(checkpoint.config, to_mapping(self.config), same, done=checkpoint.step)
        self.policy.load_weights(checkpoint.weights)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step = checkpoint.step
