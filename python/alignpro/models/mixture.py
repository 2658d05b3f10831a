"""Several adapters drawn from as one: prod_k rho_k^w_k, where all share the base weights.

Token by token it is one softmax, of the weighted sum of the members' last states (MOD,
arXiv 2406.18853, equation 7). Of whole sequences it is not: q, what token-wise draws follow, has

    prod_k rho_k(y)^w_k = q(y) prod_t Z_t,    Z_t <= 1 where no weight is below 0

(Hoelder), so that a draw y of q that is accepted with probability

    a(y) = exp(sum_k w_k log rho_k(y) - log q(y))

follows prod_k rho_k^w_k exactly, and the mean of a is what that sums to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from alignpro import native
from alignpro.files import write_json
from alignpro.models.adapter import AdapterWeights, LoraWeights, save_peft
from alignpro.models.adapter_files import MIXTURE, adapter_folder, base_of_folder, is_mixture
from alignpro.models.soft_prompt import SoftPrompt, SoftRows, placed_in, placed_of

if TYPE_CHECKING:
    from alignpro.models.native_model import NativeModel
    from alignpro.native import core

BASE = "base"  # the member without an adapter
Sampling = Literal["token", "sequence"]
Member = LoraWeights | SoftPrompt | str | Path
_SUM = 1e-6


@dataclass(frozen=True, eq=False)
class Mixture:
    """prod_k rho_k^w_k of prompters, or of any model's adapters, that share their base weights.

    Stands wherever text is drawn with an adapter: `NativeModel.generate`, `Pipeline.with_adapter`,
    `Prompter`, an evaluation. It has no gradients and trains nothing. Its keys and values take the
    room of all members.

    Args:
        members: (PEFT folder, `LoraWeights` or "base", weight) each; real weights that sum to 1,
            negative ones too. A folder that is called "base" is "./base". Soft prompts are mixed
            with soft prompts of as many rows at the same place, which all read the same tokens.
        sampling: "token", or "sequence", the exact mixture of whole sequences by rejection: draws
            that are refused are made anew. It needs weights of 0 and above.
        tries: most draws of a sequence; of these the likeliest to be accepted is taken, then.

    Raises:
        ValueError: no members, what is none, weights that are not finite or do not sum to 1, or
            members known to be trained for different base weights.
    """

    members: tuple[tuple[Member, float], ...]
    sampling: Sampling = "token"
    tries: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(_checked(pair) for pair in self.members))
        if not self.members:
            raise ValueError("mixture: expected at least one member, got none")
        total = sum(weight for _, weight in self.members)
        if abs(total - 1.0) > _SUM:
            raise ValueError(f"mixture: expected weights that sum to 1, got a sum of {total:.9g}")
        if self.sampling not in get_args(Sampling):
            expected = '"token" or "sequence"'
            raise ValueError(f"mixture: sampling: expected {expected}, got {self.sampling!r}")
        if not isinstance(self.tries, int) or isinstance(self.tries, bool) or self.tries < 1:
            raise ValueError(f"mixture: tries: expected an integer above 0, got {self.tries!r}")
        least = min(weight for _, weight in self.members)
        if self.sampling == "sequence" and least < 0:
            raise ValueError(
                f"mixture: sampling sequence: expected weights of 0 and above, got {least:g}; "
                "token takes any"
            )
        bases: dict[str, str] = {}  # by fingerprint
        for member, _ in self.members:
            if isinstance(member, AdapterWeights):
                bases.setdefault(member.base_fingerprint, member.base_model_name)
        _check_bases(bases)


def _checked(pair: Any) -> tuple[Member, float]:
    expected = 'mixture: expected (PEFT folder, LoraWeights or "base", weight) a member, got'
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{expected} {pair!r}")
    member, weight = pair
    if not isinstance(member, (LoraWeights, SoftPrompt, str, Path)) or member == "":
        raise ValueError(f"{expected} {type(member).__name__} {member!r}")
    number = isinstance(weight, (int, float, np.floating)) and not isinstance(weight, bool)
    with contextlib.suppress(OverflowError):  # an integer that no float holds
        if number and math.isfinite(weight):
            return member, float(weight)
    raise ValueError(f"mixture: expected a finite number as weight, got {reprlib.repr(weight)}")


def _check_bases(bases: Mapping[str, str]) -> None:
    known = [name or hashed[:12] for hashed, name in bases.items() if hashed]
    if len(known) > 1:
        raise ValueError(
            f"mixture: expected members of one base model, got those of {', '.join(known)}"
        )


# --- in a folder ---


def read_mixture(folder: str | Path) -> Mixture:
    """What mixture.json of a folder says; the paths in it are relative to the folder.

    Raises:
        ValueError: no mixture, or one whose members are not there; it names the file.
    """
    folder = Path(folder)
    file = folder / MIXTURE
    try:
        read = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a JSON object: {error}") from None
    members = read.get("members") if isinstance(read, dict) else None
    if not isinstance(members, dict):
        raise ValueError(f'{file}: expected "members", folders and their weights, in an object')
    try:
        mixture = Mixture(
            tuple(
                (name if name == BASE else str(folder / name), weight)
                for name, weight in members.items()
            ),
            sampling=read.get("sampling", "token"),
            tries=read.get("tries", Mixture.tries),
        )
        bases: dict[str, str] = {}
        for name, _ in mixture.members:
            if name == BASE or not isinstance(name, str):
                continue
            if is_mixture(name):
                raise ValueError(f"mixture: {name}: is a mixture itself; name its members")
            bases.setdefault(*base_of_folder(adapter_folder(name)))
        _check_bases(bases)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{file}: {error}") from None
    return mixture


def save_mixture(
    folder: Path,
    members: Mapping[str, tuple[AdapterWeights | None, float]],
    *,
    sampling: Sampling = "token",
    tries: int = Mixture.tries,
    about: Mapping[str, Any] | None = None,
) -> Mixture:
    """Write a mixture with its members' adapters, so that the folder stands alone.

    members: by name; None is the base. about: more keys of mixture.json.
    """
    mixture = Mixture(
        tuple((BASE if adapter is None else adapter, w) for adapter, w in members.values()),
        sampling,
        tries,
    )
    weights: dict[str, float] = {}
    for name, (adapter, weight) in members.items():
        if adapter is not None:
            save_peft(folder / "members" / name, adapter)
        weights[BASE if adapter is None else f"members/{name}"] = weight
    plain = {"members": weights, "sampling": sampling, "tries": tries, **(about or {})}
    write_json(folder / MIXTURE, plain)
    return mixture


# --- in the engine ---


def hint_of(adapter: Any) -> str:
    """Why a mixture is not taken where it is not."""
    is_one = isinstance(adapter, (Mixture, PreparedMixture))
    return "; text is drawn with a mixture and scored, and nothing is trained from it" * is_one


def check_streams(adapter: Any) -> None:
    """Refuse to stream what may be drawn anew. Raises ValueError."""
    if isinstance(adapter, (Mixture, PreparedMixture)) and adapter.sampling == "sequence":
        raise ValueError(
            "adapter: a mixture's sampling sequence may take back what is written, and is not "
            "streamed; sampling token is"
        )


@dataclass(frozen=True, eq=False)
class PreparedMixture:
    """A mixture with the engine's copies of its members' adapters."""

    made: core.Mixture
    sampling: Sampling = "token"
    tries: int = 1
    rows: SoftRows | None = None  # of every member

    @functools.cached_property
    def lanes(self) -> list[tuple[core.Adapter | None, float]]:
        return self.made.lanes

    def hidden(
        self,
        model: core.Model,
        sequences: list[list[int]],
        starts: list[int],
        temperature: float,
    ) -> NDArray[np.float32]:
        """The states [values, hidden] that the mixture's scored tokens are predicted from: summed
        as the engine sums them, in float64 and in the order of the lanes."""
        total: NDArray[np.float64] | None = None
        for adapter, weight in self.lanes:
            scored = model.score(
                sequences, starts, adapter=adapter, temperature=temperature, with_hidden=True
            )
            assert scored.hidden is not None
            part = np.float64(weight) * scored.hidden.astype(np.float64)
            total = part if total is None else total + part
        assert total is not None
        return total.astype(np.float32)

    def sequence_logprobs(
        self,
        model: core.Model,
        prompts: Sequence[list[int]],
        written: Sequence[list[int]],
        temperature: float,
    ) -> list[float]:
        """sum_k w_k log rho_k(written | prompt), in nats, not normalised."""
        sequences = [p + w for p, w in zip(prompts, written, strict=True)]
        ends = np.cumsum([len(w) for w in written])[:-1]
        sums = np.zeros(len(sequences))
        for adapter, weight in self.lanes:
            scored = model.score(
                sequences, [len(p) for p in prompts], adapter=adapter, temperature=temperature
            )
            parts = np.split(np.asarray(scored.logprob, np.float64), ends)
            sums += weight * np.array([math.fsum(part) for part in parts])
        return [float(value) for value in sums]


def prepare(model: NativeModel, adapter: Any) -> core.Adapter | PreparedMixture | None:
    """See `NativeModel.prepare`."""
    if isinstance(adapter, PreparedMixture):
        return adapter
    if isinstance(adapter, (str, os.PathLike)) and is_mixture(Path(adapter)):
        adapter = read_mixture(Path(adapter))
    if not isinstance(adapter, Mixture):
        return model.make_adapter(adapter)
    rows, members = soft_rows(adapter), []
    for member, weight in adapter.members:
        try:
            members.append((None if member == BASE else model.make_adapter(member), weight))
        except ValueError as error:
            raise ValueError(f"mixture: {error}") from None
    made = native.core.Mixture(members)
    return PreparedMixture(made, adapter.sampling, adapter.tries, rows)


def soft_rows(adapter: Any) -> SoftRows | None:
    """Where rows of a soft prompt stand in what is read with an adapter, which may be all that
    `NativeModel.prepare` takes or gives; None where none do.

    Raises:
        ValueError: a mixture whose members read different tokens.
    """
    if isinstance(adapter, native.core.Adapter):
        return placed_of(adapter)
    if isinstance(adapter, SoftPrompt):
        return adapter.placed
    if isinstance(adapter, PreparedMixture):
        return adapter.rows
    if isinstance(adapter, (str, os.PathLike)):
        folder = Path(adapter)
        if not is_mixture(folder):
            with contextlib.suppress(FileNotFoundError):  # the engine says what is missing
                return placed_in(adapter_folder(folder))
            return None
        adapter = read_mixture(folder)
    if not isinstance(adapter, Mixture):
        return None
    first, *others = (soft_rows(None if m == BASE else m) for m, _ in adapter.members)
    if any(other != first for other in others):
        raise ValueError(
            "mixture: expected members that read the same tokens, got soft prompts beside others, "
            "or such of different numbers of rows or places"
        )
    return first


def load_writer(model: NativeModel, folder: str | Path) -> AdapterWeights | Mixture:
    """What a folder draws text with: `NativeModel.load_adapter`, or its mixture, with the adapters
    of the members read."""
    if not is_mixture(folder):
        return model.load_adapter(folder)
    mixture = read_mixture(folder)
    members = tuple(
        (member if member == BASE else model.load_adapter(str(member)), weight)
        for member, weight in mixture.members
    )
    return replace(mixture, members=members)


def score_tokens(
    model: NativeModel,
    sequences: list[list[int]],
    starts: list[int],
    *,
    adapter: Any = None,
    temperature: float = 1.0,
    reference: Any = None,
    with_reference: bool = False,
) -> core.Score:
    """``core_model.score`` without gradients, of mixtures, token by token, too: a pass for each
    member. Adapters are what `NativeModel.prepare` takes."""
    given: dict[str, Any] = {"with_reference": with_reference}
    for name, hidden, one in (
        ("adapter", "given_hidden", model.prepare(adapter)),
        ("reference", "reference_hidden", model.prepare(reference)),
    ):
        if isinstance(one, PreparedMixture):
            given[hidden] = one.hidden(model.core_model, sequences, starts, temperature)
        else:
            given[name] = one
    return model.core_model.score(sequences, starts, temperature=temperature, **given)
