"""Nested sampling: how many rewrites a prompt, and how many responses a rewrite."""

from __future__ import annotations


def allocations(budget: int) -> list[tuple[int, int]]:
    """Every (N, M) with N * M = budget and N >= 2, by growing M."""
    return [(budget // m, m) for m in range(1, budget // 2 + 1) if budget % m == 0]


def allocate(
    budget: int, *, between: float, within: float, rewrite_cost: float, response_cost: float
) -> tuple[int, int]:
    """The (N, M) with N * M = budget, N >= 2, of the least variance times cost.

    A gradient over N rewrites, each judged by the mean of M responses, has a variance that goes as
    ``(between + within / M) / N``, and costs ``N (c_p + M c_t)``. Their product,

        (between + within / M) (c_p + M c_t),

    says what a unit of precision costs. It is minimal at
    ``M* = sqrt(within / between * c_p / c_t)`` [derived: set the derivative by M to 0]. A baseline
    over the other N - 1 rewrites adds its own noise, a factor of ``N / (N - 1)``, which speaks
    against groups of 2. Of the divisors of the budget the best by the product with that factor is
    taken, the smaller M on a tie. A rewrite that costs nothing (a budget of target tokens alone)
    makes M = 1 best whatever the split: a fresh rewrite brings a fresh response along.

    Args:
        between, within: estimates of the reward's variance over rewrites, and over the responses
            to one (`alignpro.statistics.law_of_total_variance`); below 0 counts as 0.
        rewrite_cost, response_cost: c_p of a rewrite, c_t of a response, in one unit.

    Raises:
        ValueError: a budget below 2, or a negative cost.
    """
    if budget < 2:
        raise ValueError(f"budget: expected at least 2 responses a prompt, got {budget}")
    if rewrite_cost < 0 or response_cost < 0:
        raise ValueError(f"costs: expected 0 or more, got {rewrite_cost} and {response_cost}")
    between, within = max(between, 0.0), max(within, 0.0)

    def price(counts: tuple[int, int]) -> float:
        n, m = counts
        return (between + within / m) * (rewrite_cost + m * response_cost) * n / (n - 1)

    return min(allocations(budget), key=price)
