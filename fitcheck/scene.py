"""One plan on one card: what stays through a phase, and the passes that phases are made of.

phases.py strings these together by method. Bytes come from memory.py (what stays) and
activations.py (what passes).
"""

from __future__ import annotations

from collections.abc import Iterator

from fitcheck import activations, kernels, memory, quants
from fitcheck.activations import Shape, Stage
from fitcheck.memory import Role
from fitcheck.ops import Setting
from fitcheck.plan import Plan
from fitcheck.report import CACHED, OUTSIDE, Moment, Phase, Term
from fitcheck.roles import roles, setting

Terms = tuple[Term, ...]


class Scene:
    """The roles of one plan on one card, and the terms that stay through a phase."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.roles = roles(plan)
        self.master = plan.precision == "bf16-master"
        self.held: Terms = ()  # what the method's own tensors take, from now on
        self._fixed = tuple(_fixed(plan))
        self._stays: dict[tuple[str, str], Terms] = {}

    def setting(self, role: str, adapters: bool = True) -> Setting:
        return setting(self.plan, self.roles[role], adapters)

    def stays(self, kind: str, role: Role) -> Terms:
        """The terms of one kind (weights, gradients, optimizer states) of one role."""
        key = (kind, role.name)
        if key not in self._stays:
            self._stays[key] = tuple(self._make(kind, role))
        return self._stays[key]

    def _make(self, kind: str, role: Role) -> Iterator[Term]:
        name, optimizer, master = role.name, self.plan.optimizer, self.master
        if kind == "weights" and self.plan.method == "inference":
            model, quant = role.model, self.plan.quant
            yield Term(
                *("weights", name, quants.weight_bytes(model, quant)),
                lambda: f"{model.id}: {model.params:,} parameters in {quant}, tensor by tensor",
            )
            sizes = []
        elif kind == "weights":
            sizes = memory.weight_sizes(role)
            yield Term("weights", name, memory.total(sizes), lambda: memory.weights_why(role))
            if adapters := memory.adapter_sizes(role):
                why = f"LoRA rank {role.rank} on {role.targets}, {role.adapter} B each"
                yield Term("adapters", name, memory.total(adapters), why)
                sizes = sizes + adapters
        elif kind == "gradients":
            sizes = memory.gradient_sizes(role)
            yield Term("gradients", name, memory.total(sizes), lambda: memory.trained_why(role))
        else:
            sizes = memory.state_sizes(role, optimizer, master, paged=False)
            yield Term(
                *("optimizer states", name, memory.total(sizes)),
                lambda: memory.states_why(role, optimizer, master),
            )
            if paged := memory.state_sizes(role, optimizer, master, paged=True):
                why = "CUDA managed memory: beside the allocator, may spill to RAM"
                yield Term("paged states", name, memory.total(paged), why, OUTSIDE)
        counted, cached = memory.rounding(sizes)
        if counted:
            why = f"{kind}: blocks of 512 B; from 10 MiB on, segments of 2 MiB"
            yield Term("allocator rounding", name, counted, why)
        if cached:
            yield Term("segment rests", name, cached, f"{kind}: reserved, not used", CACHED)

    def resident(self, phase: str, states: bool = True) -> Terms:
        """What is on the card throughout a phase, whatever the phase does."""
        plan, terms = self.plan, list(self._fixed)
        for role in self.roles.values():
            if role.name in (plan.offload or ()) and role.name not in phase:
                continue
            terms += self.stays("weights", role)
            if role.tuning and states and "optimizer" not in (plan.offload or ()):
                terms += self.stays("optimizer states", role)
        if plan.rollout in ("vllm", "sglang") and (
            phase.startswith("rollout") or not plan.rollout_sleep
        ):
            share = int(plan.rollout_memory * plan.memory.total_bytes)
            why = f"{plan.rollout} reserves {plan.rollout_memory} of the card"
            terms.append(Term("inference engine", "rollout", share, why, OUTSIDE))
        return (*terms, *self.held)

    def forward(
        self,
        phase: str,
        role: str,
        shape: Shape,
        head: str,
        extra: Terms = (),
        adapters: bool = True,
    ) -> Phase:
        """A pass without gradients: its layers, then its head."""
        model, how = self.roles[role].model, self.setting(role, adapters)
        layers, ends = activations.inference_peak(model, how, shape, head)
        stays = (*self.resident(phase), *extra, *_mask(how, shape))
        what = (model, how, shape)
        running = Term(
            *("layer activations", role, layers), lambda: activations.explain(*what, "layer")
        )
        logits = Term(*(_head_name(head), role, ends), lambda: activations.explain(*what, head))
        return Phase(
            phase, (Moment("layers", (*stays, running)), Moment("head", (*stays, logits)))
        )

    def update(
        self,
        prefix: str,
        role: str,
        shape: Shape,
        head: str,
        steps: int,
    ) -> Iterator[Phase]:
        """Forward, loss, backward and step of one role; gradients of `steps` micro-batches add up."""
        plan, who, how = self.plan, self.roles[role], self.setting(role)
        older = self.stays("gradients", who) if steps > 1 else ()
        stages = activations.update_stages(
            who.model, how, shape, head, plan.checkpointing, accumulate=steps > 1
        )
        for part in ("forward", "loss", "backward"):
            phase = f"{prefix}.{part}"
            stays = (*self.resident(phase), *_mask(how, shape), *older)
            moments = tuple(
                Moment(stage.name, (*stays, *self._stage(who, stage, how, shape, head)))
                for stage in stages
                if stage.phase == part
            )
            yield Phase(phase, moments)
        size, why = memory.step_temporary(who, plan.optimizer, self.master)
        if "optimizer" in plan.offload:
            size, why = 0, "the optimizer runs on the CPU"
        temporary = Term("optimizer temporary", role, size, why)
        stays = (*self.resident(f"{prefix}.step"), *self.stays("gradients", who), temporary)
        yield Phase(f"{prefix}.step", (Moment("optimizer step", stays),))

    def graph(self, role: str, shape: Shape, head: str, steps: int) -> Terms:
        """What a forward pass with gradients leaves behind, for its backward."""
        who, how = self.roles[role], self.setting(role)
        stage = activations.update_stages(
            who.model, how, shape, head, self.plan.checkpointing, accumulate=steps > 1
        )[0]
        loss = activations.training_cost(who.model, how, shape, head).kept
        terms = (
            Term("activations", role, stage.activations, "of the policy's graph"),
            Term("autocast copies", role, stage.casts, "16-bit casts of fp32 weights, cached"),
            Term(_head_name(head), role, loss, "log-softmax of the policy, kept for its backward"),
        )
        return terms + (self.stays("gradients", who) if steps > 1 else ())

    def _stage(
        self, who: Role, stage: Stage, how: Setting, shape: Shape, head: str
    ) -> Iterator[Term]:
        role, model = who.name, who.model
        if self.plan.checkpointing:
            saved = f"one layer input for each of {model.num_layers} layers (checkpointing)"
        else:
            saved = f"saved for backward in each of {model.num_layers} layers"
        yield Term("activations", role, stage.activations, saved)
        if stage.casts:
            yield Term("autocast copies", role, stage.casts, "16-bit casts of fp32 weights, cached")
        name = _head_name(head) if stage.name == "logits" else "layer activations"
        piece = head if stage.name == "logits" else "layer"
        what = (model, how, shape, piece, True)
        yield Term(name, role, stage.working, lambda: activations.explain(*what))
        if stage.gradients:
            yield Term("gradients", role, stage.gradients, "made so far in this backward")


def _head_name(head: str) -> str:
    return "score head" if head == "score" else "logits"


def _fixed(plan: Plan) -> Iterator[Term]:
    if plan.gpu.vendor != "apple":
        why = "CUDA context and loaded kernels: an estimate, 256 to 492 MiB were seen"
        yield Term("CUDA context", "card", kernels.CONTEXT, why, OUTSIDE)
    if size := kernels.cublas_workspace(plan.gpu):
        threads = 1 if plan.method == "inference" else 2
        why = f"{threads} x {size:,} B, one a thread that multiplies (forward, backward), kept"
        yield Term("cuBLAS workspace", "card", threads * size, why)


def _mask(how: Setting, shape: Shape) -> Terms:
    if not how.masked:
        return ()
    size = shape.rows * shape.length * (shape.length + shape.past)
    return (Term("attention mask", "batch", size, "rows x length x length x 1 B"),)
