"""Records out of texts, with a verifier: pure functions of text, but for `draw`, which asks."""

from __future__ import annotations
