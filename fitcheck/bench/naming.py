"""What an allocation of a trace is: the estimate's own names, so that the two can be compared.

    Names(plan, set()).of(Made("aten.mm.default", "policy.lm_head", "update.forward", 4096, True))
    # Holder("policy", "logits", "aten.mm.default")

Weights, gradients and optimizer states are known for sure, since their tensors are; the rest is
told by the phase, the module and the operator that made it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fitcheck.plan import Plan
from fitcheck.roles import BYTES

HEADS = ("lm_head", "embed_out", "head")  # what transformers and Scorer call the last layer
OUTSIDE = "-"  # between phases


class Holder(NamedTuple):
    """Whose memory it is, what it is, and the operator that made it."""

    role: str
    kind: str
    what: str


class Made(NamedTuple):
    """An allocation: its operator, the module and the phase it was made in, bytes.

    kept: it outlives the stretch of its phase.
    """

    by: str
    where: str
    phase: str
    size: int
    kept: bool


class Names:
    """What a plan calls things."""

    def __init__(self, plan: Plan, weights: set[int]) -> None:
        """weights: how many elements the weights have that autocast casts."""
        self.scores = plan.method == "reward"
        self.offload = plan.offload or ()
        width = BYTES[plan.compute_dtype]
        self.casts = {count * width for count in weights} if plan.autocast else set()
        # The gradient of the vocabulary's head, while it waits for that of the embedding.
        self.table = plan.model.vocab_size * plan.model.embedding_width * BYTES[plan.weight_dtype]
        self.row = plan.model.vocab_size * width  # logits of one token

    def of(self, made: Made) -> Holder:
        """Role and name of an allocation that is neither weight, gradient nor state."""
        return Holder(*self._named(made), made.by)

    def _named(self, made: Made) -> tuple[str, str]:
        by, phase, role = made.by, made.phase, _role(made)
        generates = phase.endswith(("prefill", "decode"))
        if by == "cublas":
            return "card", "cuBLAS workspace"
        if phase == OUTSIDE:
            return "batch", "token ids and masks"
        if phase == "advantages":
            return "batch", "rollout tensors"
        if phase.endswith(".step"):
            return role, "optimizer temporary"
        if by.startswith("aten.bitwise_and"):
            return "batch", "attention mask"
        if role in self.offload and by.startswith("aten.empty"):
            return role, "weights"
        if made.where.rpartition(".")[2] in HEADS:  # its weight's cast as well
            return role, self._head(role)
        if by.startswith("aten._to_copy") and made.size in self.casts:
            return role, "autocast copies"
        if generates and by.startswith(("aten.cat", "aten.clone")):
            if made.kept or phase.endswith("decode"):
                return role, "KV cache"
            return role, "layer activations"
        if by.startswith("aten.embedding_dense_backward"):
            return role, "embedding gradient"
        if phase.endswith("backward") and made.size == self.table:
            return role, "gradients"
        if self._of_head(made):
            return role, self._head(role)
        forward = phase.endswith("forward") and made.kept
        return role, "activations" if forward else "layer activations"

    def _head(self, role: str) -> str:
        return "score head" if role in ("reward", "critic") or self.scores else "logits"

    def _of_head(self, made: Made) -> bool:
        if made.phase.endswith(".loss"):
            return True
        if made.where:
            return False
        # In backward no module runs; elsewhere only what comes after the model is outside of it.
        return made.size % self.row == 0 if made.phase.endswith("backward") else True


def _role(made: Made) -> str:
    """The role whose module ran, or that the phase is about."""
    of_module = re.match(r"(policy|reference|reward|critic)\b", made.where)
    of_phase = re.search(r"\b(reference|reward|critic)\b", made.phase)
    found = of_module or of_phase
    return found[1] if found else "policy"
