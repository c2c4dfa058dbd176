"""What is alive together: each method as a list of phases, each phase as its largest moments.

The order and the lifetimes are those of fitcheck/bench/steps, which runs them for real. To add a
method, add one function here and one step there.
"""

from __future__ import annotations

from collections.abc import Iterator

from fitcheck import engines, memory, shards, trl
from fitcheck.activations import Shape
from fitcheck.errors import FitCheckError
from fitcheck.plan import TRANSFORMERS_QUANTS, Plan
from fitcheck.report import Moment, Phase, Term
from fitcheck.roles import BYTES
from fitcheck.scene import Scene
from fitcheck.stays import Terms


def phases(plan: Plan) -> tuple[Phase, ...]:
    """The phases of one step of the plan's method, in order, in the steady state."""
    scene = Scene(plan)
    stays = scene.resident("load", states=False)
    loaded = tuple(term for term in stays if term.name != "cuBLAS workspace")  # no product yet
    methods = METHODS | trl.METHODS if plan.recipe == "trl" else METHODS
    return (Phase("load", (Moment("weights", loaded),)), *methods[plan.method](scene))


def inference(scene: Scene) -> Iterator[Phase]:
    plan = scene.plan
    rows, context = plan.on_card(plan.concurrency), plan.context
    if plan.engine != "transformers":
        yield from engines.PHASES[plan.engine](scene, rows)
        return
    scene.held = _cache(scene, rows, context, memory.KV_BYTES[plan.kv_cache])
    in_transformers = plan.quant in TRANSFORMERS_QUANTS and plan.kv_cache == plan.compute_dtype
    beyond = _beyond(scene, 1, context) if in_transformers else ()
    yield scene.forward("prefill", "policy", Shape(1, context), "last_logits", beyond)
    decode = scene.forward("decode", "policy", Shape(rows, 1, past=context), "last_logits")
    yield _growing(scene, decode, rows, context, beyond) if in_transformers else decode


def sft(scene: Scene) -> Iterator[Phase]:
    plan = scene.plan
    rows = plan.on_card(plan.batch)
    scene.held = _batch(rows * plan.sequence, "token ids and labels", 16)
    shape, head = _text(scene, plan.micro_batch, plan.sequence)
    yield from scene.update("update", "policy", shape, head, rows // plan.micro_batch)


def reward(scene: Scene) -> Iterator[Phase]:
    plan = scene.plan
    rows = plan.on_card(plan.batch)
    scene.held = _batch(2 * rows * plan.sequence, "token ids and masks", 16)
    shape = Shape(2 * plan.micro_batch, plan.sequence)
    yield from scene.update("update", "policy", shape, "score", rows // plan.micro_batch)


def dpo(scene: Scene) -> Iterator[Phase]:
    """Chosen and rejected in one forward; the reference runs on top of the policy's graph."""
    plan = scene.plan
    rows = plan.on_card(plan.batch)
    scene.held = _batch(2 * rows * plan.sequence, "token ids and masks", 16)
    shape = Shape(2 * plan.micro_batch, plan.sequence, plan.sequence - 1)
    steps = rows // plan.micro_batch
    role = "reference" if plan.reference == "copy" else "policy"
    for phase in scene.update("update", "policy", shape, LOSSES[plan.loss], steps):
        if phase.name == "update.loss" and plan.reference != "precomputed":
            graph = scene.graph("policy", shape, LOSSES[plan.loss], steps)
            chunk = Shape(2 * plan.score_batch, plan.sequence, plan.sequence - 1)
            own = plan.reference == "copy"
            yield scene.forward(
                "score.reference", role, chunk, LOSSES[plan.loss], graph, adapters=own
            )
        yield phase


def grpo(scene: Scene) -> Iterator[Phase]:
    plan = scene.plan
    yield from _rollout(scene)
    scored = Shape(plan.score_batch, plan.prompt + plan.response, plan.response)
    yield from _scores(scene, scored)
    yield _advantages(scene)
    shape = Shape(plan.micro_batch, scored.length, plan.response)
    steps = plan.on_card(plan.minibatch) // plan.micro_batch
    update = scene.update("update.policy", "policy", shape, LOSSES[plan.loss], steps)
    yield from _with_pretraining(scene, update) if plan.ptx_batch else update


def ppo(scene: Scene) -> Iterator[Phase]:
    plan = scene.plan
    yield from grpo(scene)  # the same rollout, scores and policy update
    if "critic" in scene.roles:
        shape = Shape(plan.micro_batch, plan.prompt + plan.response, plan.response)
        steps = plan.on_card(plan.minibatch) // plan.micro_batch
        for phase in scene.update("update.critic", "critic", shape, "score", steps):
            if phase.name != "update.critic.loss":  # its loss is a number a token
                yield phase


LOSSES = {"full": "log_probs", "chunked": "chunked_loss", "fused": "fused_loss"}
METHODS = {f.__name__: f for f in (inference, sft, reward, dpo, grpo, ppo)}


def _with_pretraining(scene: Scene, update: Iterator[Phase]) -> Iterator[Phase]:
    """PPO-ptx: pretraining text through the same phases, on top of PPO's gradients."""
    plan = scene.plan
    tokens = plan.prompt + plan.response
    rows = min(plan.micro_batch, plan.on_card(plan.ptx_batch))
    shape, head = _text(scene, rows, tokens)
    extra = {p.name: p.moments for p in scene.update("update.policy", "policy", shape, head, 2)}
    for phase in update:
        yield Phase(phase.name, (*phase.moments, *extra[phase.name]))


def _text(scene: Scene, rows: int, tokens: int) -> tuple[Shape, str]:
    """Shape and loss of next-token prediction."""
    if scene.plan.loss != "full":
        return Shape(rows, tokens, tokens - 1), LOSSES[scene.plan.loss]
    old = scene.plan.recipe == "hf-4.48"
    return Shape(rows, tokens, tokens), "shifted_lm_loss" if old else "lm_loss"


def _rollout(scene: Scene) -> Iterator[Phase]:
    """Prefill all prompts at once, then a token at a time with a growing KV cache."""
    plan, tokens = scene.plan, scene.plan.prompt + scene.plan.response
    rows = plan.on_card(plan.batch)
    scene.held = _batch(rows * tokens, "token ids and masks", 16)
    if plan.rollout != "transformers":
        _check_engine(scene)
        yield Phase("rollout", (Moment("engine", scene.resident("rollout")),))
    else:
        widths = scene.cache_widths()
        cache = _cache(scene, rows, plan.prompt, *widths)
        whole = shards.generation(plan, scene.roles["policy"])
        first = (*whole, *cache, *_beyond(scene, rows, plan.prompt))
        shape = Shape(rows, plan.prompt)
        yield scene.forward("rollout.prefill", "policy", shape, "last_logits", first)
        cache = (*whole, *_cache(scene, rows, tokens, *widths))
        shape = Shape(rows, 1, past=tokens)
        decode = scene.forward("rollout.decode", "policy", shape, "last_logits", cache)
        yield _growing(scene, decode, rows, tokens, first, cache)
    width = 4 * 6 * rows * plan.response
    rollout = Term("rollout tensors", "batch", width, "log-probs, values, rewards, ...: fp32 each")
    scene.held = (*scene.held, rollout)


def _growing(
    scene: Scene, decode: Phase, rows: int, tokens: int, first: Terms, cache: Terms = ()
) -> Phase:
    """A decode phase with the moments at which its cache grows.

    At the first token that is what prefill left; at the last a layer's cache and its longer copy.
    """
    growth = memory.kv_growth(scene.plan.model, rows, tokens, scene.cache_widths()[0])
    copy = Term("cache growth", "policy", growth, "the old K of a layer beside its longer copy")
    stays = scene.resident(decode.name)
    begin = Moment("first token", (*stays, *first))
    end = Moment("cache growth", (*stays, *cache, copy))
    return Phase(decode.name, (begin, end, *decode.moments))


def _check_engine(scene: Scene) -> None:
    """The engine's share holds a second copy of the weights and one sequence's cache at least."""
    plan = scene.plan
    share = int(plan.rollout_memory * plan.memory.total_bytes)
    width = BYTES[plan.compute_dtype]
    cache = memory.kv_cache(plan.model, 1, plan.prompt + plan.response, width)
    least = plan.model.params * width + cache
    if share < least:
        raise FitCheckError(
            f"--rollout-memory {plan.rollout_memory} gives {plan.rollout} {share:,} B, less than "
            f"the {least:,} B of its own weights and one sequence's cache",
            f"--rollout-memory {min(0.99, least / plan.memory.total_bytes + 0.02):.2f}, "
            "or --rollout transformers",
        )


def _scores(scene: Scene, shape: Shape) -> Iterator[Phase]:
    plan = scene.plan
    yield scene.forward("score.policy", "policy", shape, LOSSES[plan.loss])
    if plan.reference != "none":
        own = plan.reference == "copy"
        role = "reference" if own else "policy"
        yield scene.forward("score.reference", role, shape, LOSSES[plan.loss], adapters=own)
    for role in ("reward", "critic"):
        if role in scene.roles:
            yield scene.forward(f"score.{role}", role, shape, "score")


def _advantages(scene: Scene) -> Phase:
    return Phase("advantages", (Moment("GAE", scene.resident("advantages")),))


def _batch(tokens: int, name: str, width: int) -> Terms:
    return (Term(name, "batch", tokens * width, f"{tokens:,} tokens x {width} B"),)


def _beyond(scene: Scene, rows: int, tokens: int) -> Terms:
    size = memory.kv_beyond(scene.plan.model, rows, tokens, *scene.cache_widths())
    why = f"{rows} x {tokens:,} tokens just read: windows are views of them until the next token"
    return (Term("KV cache beyond windows", "policy", size, why),) if size else ()


def _cache(scene: Scene, rows: int, tokens: int, *widths: float) -> Terms:
    model = scene.plan.model
    size = memory.kv_cache(model, rows, tokens, *widths)
    return (Term("KV cache", "policy", size, lambda: memory.kv_why(model, rows, tokens, *widths)),)
