"""One plan on one card: what stays through a phase, and the passes that phases are made of.

phases.py strings these together by method. Bytes come from memory.py (what stays) and
activations.py (what passes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache

from fitcheck import activations, memory, shards
from fitcheck.activations import Shape
from fitcheck.memory import Role
from fitcheck.model import Model
from fitcheck.ops import Setting
from fitcheck.plan import Plan
from fitcheck.report import OUTSIDE, Moment, Phase, Term
from fitcheck.roles import roles, setting
from fitcheck.stays import Terms, fixed, quantized, stays
from fitcheck.walk import Stage


class Scene:
    """The roles of one plan on one card, and the terms that stay through a phase."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.roles = roles(plan)
        self.master = plan.precision == "bf16-master"
        self.held: Terms = ()  # what the method's own tensors take, from now on
        self._fixed = tuple(fixed(plan))
        self._settings: dict[tuple[str, bool], Setting] = {}
        self._resident: dict[tuple[tuple[str, ...], bool, bool], Terms] = {}

    def setting(self, role: str, adapters: bool = True) -> Setting:
        key = (role, adapters)
        if key not in self._settings:
            self._settings[key] = setting(self.plan, self.roles[role], adapters)
        return self._settings[key]

    def cache_widths(self) -> tuple[int, int]:
        """Bytes of an element of K and of V in the policy's KV cache."""
        return activations.cache_widths(_alike(self.plan.model), self.setting("policy"))

    def stays(self, kind: str, role: Role) -> Terms:
        """The terms of one kind (weights, gradients, optimizer states) of one role."""
        plan = self.plan
        if kind == "weights" and plan.method == "inference":
            left = plan.quant in ("nf4", "int8") and role.stored == "plain"
            return quantized(role, "bf16" if left else plan.quant, plan.engine)
        if shards.in_ram(plan, kind) and role.tuning:
            return ()
        number = shards.cards(plan, kind)
        return stays(kind, role, plan.optimizer, self.master, number, shards.is_flat(plan))

    def gradients(self, role: Role) -> Terms:
        """Those of earlier micro-batches; ZeRO-3 has a buffer of them that is always there."""
        return () if self.plan.sharding == "zero3" else self.stays("gradients", role)

    def resident(self, phase: str, states: bool = True) -> Terms:
        """What is on the card throughout a phase, whatever the phase does."""
        plan = self.plan
        away = tuple(name for name in plan.offload or () if name not in phase)
        engine = plan.rollout in ("vllm", "sglang") and (
            phase.startswith("rollout") or not plan.rollout_sleep
        )
        key = (away, states, engine)
        if key not in self._resident:
            self._resident[key] = (*self._fixed, *self._kept(*key))
        return (*self._resident[key], *self.held)

    def _kept(self, away: tuple[str, ...], states: bool, engine: bool) -> Iterator[Term]:
        for role in self.roles.values():
            if role.name not in away:
                yield from self.stays("weights", role)
                if role.base and role.model.adapter_bytes:
                    why = f"{role.model.id}: a PEFT adapter, as its file has it"
                    yield Term("adapter", role.name, role.model.adapter_bytes, why)
                if role.tuning and states:
                    yield from shards.always(self.plan, role)
                    if "optimizer" not in away:
                        yield from self.stays("optimizer states", role)
        if engine:
            plan = self.plan
            share = int(plan.rollout_memory * plan.memory.total_bytes)
            why = f"{plan.rollout} reserves {plan.rollout_memory} of the card"
            yield Term("inference engine", "rollout", share, why, OUTSIDE)

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
        model, how = _alike(self.roles[role].model), self.setting(role, adapters)
        casts, layers, ends = activations.inference_peak(model, how, shape, head)
        stays = (*self.resident(phase), *extra, *_mask(how, shape))
        if casts:
            stays += (Term("autocast copies", role, casts, "16-bit casts of fp32 weights, cached"),)
        what = (model, how, shape)
        running = Term(
            *("layer activations", role, layers),
            lambda: activations.explain(*what, "layer", "no-grad"),
        )
        logits = Term(
            *(_head_name(head), role, ends), lambda: activations.explain(*what, head, "no-grad")
        )
        layer, end = (self._gathered(phase, role, piece) for piece in ("layers", "head"))
        moments = (
            Moment("layers", (*stays, *layer, running)),
            Moment("head", (*stays, *end, logits)),
        )
        return Phase(phase, moments)

    def update(
        self,
        prefix: str,
        role: str,
        shape: Shape,
        head: str,
        steps: int,
    ) -> Iterator[Phase]:
        """Forward, loss, backward, step of one role; gradients of `steps` micro-batches add up."""
        plan, who, how = self.plan, self.roles[role], self.setting(role)
        older = self.gradients(who) if steps > 1 else ()
        stages = activations.update_stages(
            *(_alike(who.model), how, shape, head, plan.checkpointing),
            accumulate=steps > 1,
            reentrant=plan.recipe == "hf-4.48",
        )
        waiting = next(stage.gradients for stage in stages if stage.phase == "backward")
        for part in ("forward", "loss", "backward"):
            phase = f"{prefix}.{part}"
            stays = (*self.resident(phase), *_mask(how, shape), *older)
            if part != "backward":
                stays += self._presents(who, shape)
            moments = tuple(
                Moment(stage.name, (*stays, *self._stage(who, stage, how, shape, head, waiting)))
                for stage in stages
                if stage.phase == part
            )
            if part == "backward" and plan.sharding == "fsdp" and who.tuning == "full":
                backward = [stage for stage in stages if stage.phase == part]
                moments += tuple(self._joined(who, how, backward, stays))
            yield Phase(phase, moments)
        size, why = memory.step_temporary(who, plan.optimizer, self.master)
        size = shards.stepped_at_once(plan, who, size)
        if "optimizer" in plan.offload:
            size, why = 0, "the optimizer runs on the CPU"
        temporary = Term("optimizer temporary", role, size, why)
        stays = (*self.resident(f"{prefix}.step"), *self.gradients(who), temporary)
        yield Phase(f"{prefix}.step", (Moment("optimizer step", stays),))

    def _presents(self, who: Role, shape: Shape) -> Terms:
        """gpt_bigcode in transformers 4.48 leaves use_cache on under checkpointing.

        Each layer's fused projection, of which keys and values are a view, stays until the loss is
        there (modeling_gpt_bigcode.py 4.48.1, lines 314, 328 and 1006).
        """
        plan, m = self.plan, who.model
        if plan.recipe != "hf-4.48" or m.model_type != "gpt_bigcode" or not plan.checkpointing:
            return ()
        width = m.hidden_size + 2 * m.head_dim * m.num_key_value_heads
        size = 2 * m.num_layers * shape.tokens * width
        why = f"2 B x {m.num_layers} layers x {shape.tokens:,} tokens x {width:,}: use_cache is on"
        return (Term("KV cache", who.name, size, why),)

    def graph(self, role: str, shape: Shape, head: str, steps: int) -> Terms:
        """What a forward pass with gradients leaves behind, for its backward."""
        who, how = self.roles[role], self.setting(role)
        model = _alike(who.model)
        stage = activations.update_stages(
            model, how, shape, head, self.plan.checkpointing, accumulate=steps > 1
        )[0]
        loss = activations.training_cost(model, how, shape, head).kept
        terms: Terms = (
            Term("activations", role, stage.activations, "of the policy's graph"),
            Term("autocast copies", role, stage.casts, "16-bit casts of fp32 weights, cached"),
            Term(_head_name(head), role, loss, "log-softmax of the policy, kept for its backward"),
        )
        terms += shards.working(self.plan, self._base(role), "loss", "held")
        return terms + (self.gradients(who) if steps > 1 else ())

    def _stage(
        self, who: Role, stage: Stage, how: Setting, shape: Shape, head: str, waiting: int
    ) -> Iterator[Term]:
        role, model = who.name, _alike(who.model)
        yield from shards.working(self.plan, self._base(role), stage.phase, stage.name)
        if self.plan.checkpointing:
            saved = f"one layer input for each of {model.num_layers} layers (checkpointing)"
        else:
            saved = f"saved for backward in each of {model.num_layers} layers"
        yield Term("activations", role, stage.activations, saved)
        if stage.name == "first layer":
            hidden = shape.tokens * model.hidden_size * how.stream
            yield from shards.hooked(self.plan, who, hidden)
        if stage.casts:
            yield Term("autocast copies", role, stage.casts, "16-bit casts of fp32 weights, cached")
        if stage.name == "embedding":
            why = f"{model.vocab_size:,} x {model.embedding_width:,} x {how.weight} B, and its sums"
            yield Term("embedding gradient", role, stage.working, why)
            yield from self._made(who, how, stage.gradients, waiting)
            return
        name = _head_name(head) if stage.name == "logits" else "layer activations"
        piece = head if stage.name == "logits" else "layer"
        until = "backward" if stage.phase == "backward" else "forward"
        if stage.phase == "forward":
            if stage.name == "logits" and head != "score":
                piece = "all_logits"
            elif self.plan.checkpointing:
                until = "no-grad"
        what = (model, how, shape, piece, until)
        yield Term(name, role, stage.working, lambda: activations.explain(*what))
        yield from self._made(who, how, stage.gradients, waiting)

    def _joined(
        self, who: Role, how: Setting, stages: list[Stage], stays: Terms
    ) -> Iterator[Moment]:
        """FSDP makes one flat gradient of a unit's gradients, while those are still there.

        The weights are views of a flat one (torch.split), so autograd joins their gradients (cat).
        """
        found, waiting = shards.units(who, how.weight), stages[0].gradients
        units = {"last layer": found.block, "first layer": found.block, "embedding": found.root}
        for stage in stages:
            if size := units.get(stage.name):
                made, kept = stage.gradients, waiting
                if stage.name == "embedding":  # the head's are among those joined
                    made, kept = made - waiting, 0
                why = f"{size:,} B of one unit's gradients, and the flat one made of them"
                terms = (
                    *shards.working(self.plan, who, "backward", stage.name),
                    Term("activations", who.name, stage.activations, "backward has yet to pass"),
                    Term("joined gradients", who.name, 2 * size, why),
                    *self._made(who, how, made, kept),
                )
                yield Moment(f"{stage.name} reduced", (*stays, *terms))

    def _made(self, who: Role, how: Setting, size: int, waiting: int) -> Iterator[Term]:
        """Gradients that a backward has made so far, or a card's share of them.

        waiting: of the head; FSDP's root, of which it is a part, is reduced at the very end.
        """
        if not size or self.plan.sharding == "zero3" or shards.in_ram(self.plan, "gradients"):
            return
        number = shards.cards(self.plan, "gradients")
        whole = waiting if self.plan.sharding == "fsdp" and who.tuning == "full" else 0
        rest = size - whole
        if who.tuning == "full":  # FSDP's shares are of the weights' own type
            rest = rest * who.weight // how.weight
        why = "made so far in this backward"
        why = f"1/{number} of those {why}, the head's whole" if number > 1 else why
        yield Term("gradients", who.name, whole - (-rest // number), why)

    def _base(self, role: str) -> Role:
        """The role whose weights run: an adapter's are those of the policy."""
        who = self.roles[role]
        return who if who.base else self.roles["policy"]

    def _gathered(self, phase: str, role: str, piece: str) -> Terms:
        """What is put together of weights that are split, in a pass without gradients."""
        if phase.startswith("rollout"):
            return ()  # all of them already were
        return shards.working(self.plan, self._base(role), "no-grad", piece)


# What a row says of a model beside its sizes; none of it moves a byte.
_TOLD = {"id", "family", "name", "size_label", "status", "sources", "checked", "license", "note"}
_TOLD |= {"release_date", "gated", "gated_basis", "architecture_class", "formula_matches"}
_TOLD |= {"params_published", "params_published_note", "checkpoint_precision", "native_fp8"}
_TOLD |= {"alignment_recipe", "alignment_recipe_source", "alignment_recipe_seen_in_stored_source"}
_TOLD |= {"rewardbench_dpo_ref_model", "has_mtp_in_checkpoint"}
_SIZES = [field.name for field in fields(Model) if field.name not in _TOLD]
_first: dict[str, Model] = {}


@lru_cache(maxsize=1024)
def _alike(model: Model) -> Model:
    """The first model seen with the very same sizes: a base and its tunings are played once."""
    return _first.setdefault(repr([getattr(model, name) for name in _SIZES]), model)


def _head_name(head: str) -> str:
    return "score head" if head == "score" else "logits"


def _mask(how: Setting, shape: Shape) -> Terms:
    if not how.masked:
        return ()
    size = shape.rows * shape.length * (shape.length + shape.past)
    why = f"{shape.rows} x {shape.length} x {shape.length + shape.past} x 1 B"
    return (Term("attention mask", "batch", size, why),)
