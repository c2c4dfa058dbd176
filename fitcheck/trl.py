"""What is alive together in TRL's trainers: PPO up to 1.12.0, SFT, DPO, reward and GRPO of 1.16.

The order and the lifetimes are those of bench/steps/trl_ppo.py and bench/steps/trl.py, which follow
TRL's own code. Lengths below: b rows of a chunk without gradients, m of a micro-batch, R response
tokens, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from fitcheck import activations, memory
from fitcheck.activations import Shape, groups, training_cost
from fitcheck.decoder import Decoder
from fitcheck.memory import Role
from fitcheck.model import Model
from fitcheck.ops import Setting
from fitcheck.report import Moment, Phase, Term
from fitcheck.roles import BYTES
from fitcheck.scene import Scene
from fitcheck.stays import Terms
from fitcheck.tape import Tape
from fitcheck.walk import Stage


def sft(scene: Scene) -> Iterator[Phase]:
    plan = scene.plan
    scene.held = (_tokens(plan.batch * plan.sequence),)
    shape = Shape(plan.micro_batch, plan.sequence, plan.sequence - 1)
    steps = plan.batch // plan.micro_batch
    yield from scene.update("update", "policy", shape, "fused_loss", steps)


def dpo(scene: Scene) -> Iterator[Phase]:
    """The reference's forward stands on the policy's graph, whose autocast region is over."""
    plan = scene.plan
    scene.held = (_tokens(2 * plan.batch * plan.sequence),)
    shape = Shape(2 * plan.micro_batch, plan.sequence, plan.sequence - 1)
    steps = plan.batch // plan.micro_batch
    own = plan.reference == "copy"
    for phase in scene.update("update", "policy", shape, "fused_loss", steps):
        yield phase
        if phase.name == "update.loss" and plan.reference != "precomputed":
            graph = scene.graph("policy", shape, "fused_loss", steps)
            graph = tuple(term for term in graph if term.name != "autocast copies")
            role = "reference" if own else "policy"
            yield scene.forward("score.reference", role, shape, "fused_loss", graph, adapters=own)


def reward(scene: Scene) -> Iterator[Phase]:
    plan = scene.plan
    scene.held = (_tokens(2 * plan.batch * plan.sequence),)
    shape = Shape(2 * plan.micro_batch, plan.sequence)
    yield from scene.update("update", "policy", shape, "score", plan.batch // plan.micro_batch)


def grpo(scene: Scene) -> Iterator[Phase]:
    """A generation at once; old log-probabilities only where it lasts several optimizer steps."""
    plan = scene.plan
    tokens = plan.prompt + plan.response
    scene.held = (_tokens(plan.batch * tokens),)
    if plan.rollout == "transformers":
        yield from _generate(scene, plan.batch)
    else:
        yield Phase("rollout", (Moment("engine", scene.resident("rollout")),))
    scored = Shape(plan.score_batch, tokens, plan.response)
    aligned = plan.epochs == 1 and plan.minibatch == plan.batch and plan.rollout == "transformers"
    if not aligned:
        yield scene.forward("score.policy", "policy", scored, "fused_loss")
    if plan.reference != "none":
        own = plan.reference == "copy"
        role = "reference" if own else "policy"
        yield scene.forward("score.reference", role, scored, "fused_loss", adapters=own)
    shape = Shape(plan.micro_batch, tokens, plan.response)
    steps = plan.minibatch // plan.micro_batch
    yield from scene.update("update.policy", "policy", shape, "fused_loss", steps)


def ppo(scene: Scene) -> Iterator[Phase]:
    """Four models; the rollout's fp32 scores stay; both graphs at once; one optimizer."""
    plan = scene.plan
    words = plan.response * plan.model.vocab_size
    kept = Term(
        *("rollout scores", "policy", 4 * plan.batch * words),
        f"{plan.batch} x {plan.response} x {plan.model.vocab_size:,} x 4 B, until the next rollout",
    )
    scene.held = (_tokens(plan.batch * (plan.prompt + plan.response)), kept)
    chunks = -(-plan.batch // plan.score_batch)
    chunk = kept.bytes // chunks
    earlier = Term("scores of chunks", "policy", kept.bytes - chunk, "of the rollout in progress")
    drawn = Term("scores of chunks", "policy", chunk, f"one fp32 row a step: {plan.response} steps")
    yield from _generate(scene, plan.score_batch, (earlier,), (drawn,))
    resident = (*scene.resident("rollout.scores"), earlier, drawn)
    cache = _cache(scene, "policy", plan.score_batch, plan.prompt + plan.response)
    stacked = Term("scores of chunks", "policy", chunk, "torch.stack of a chunk's steps")
    padded = Term("rollout scores", "policy", kept.bytes, "a copy of all chunks together")
    yield Phase(
        "rollout.scores",
        (Moment("stack", (*resident, stacked, cache)), Moment("pad", (*resident, padded))),
    )
    yield from _scores(scene)
    yield from _update(scene)


def _scores(scene: Scene) -> Iterator[Phase]:
    """Each model over a chunk, with every layer's hidden states; the reference with a cache too."""
    plan = scene.plan
    shape = Shape(plan.score_batch, plan.prompt + plan.response, plan.response)
    row = 4 * plan.response * plan.model.vocab_size
    one = Term("logits", "policy", row, "of one row, less their largest: logsumexp")
    yield Phase("score.policy", (Moment("logsumexp", (*scene.resident("score.policy"), one)),))
    own = plan.reference == "copy"
    who = "reference" if own else "policy"
    extra = (
        _hidden_states(scene, who, shape, scene.roles[who].model.num_layers - 1),
        _cache(scene, who, shape.rows, shape.length),
    )
    yield scene.forward("score.reference", who, shape, "all_logits", extra, adapters=own)
    for role in ("critic", "reward"):
        states = _hidden_states(scene, role, shape, scene.roles[role].model.num_layers - 1)
        yield scene.forward(f"score.{role}", role, shape, "score", (states,))


class Graph(NamedTuple):
    """One role's forward with gradients, and what its output holds."""

    role: Role
    stages: tuple[Stage, ...]
    kept: int  # of the graph alone
    outputs: int  # hidden states and cache alone
    beside: int  # those of them that the graph does not hold anyway


def _update(scene: Scene) -> Iterator[Phase]:
    """The critic, then the policy on top of it, one loss, one optimizer."""
    plan = scene.plan
    shape = Shape(plan.micro_batch, plan.prompt + plan.response, plan.response)
    again = plan.batch > plan.micro_batch  # gradients of several micro-batches add up
    critic, policy = (
        _graph(scene, role, shape, head, again)
        for role, head in (("critic", "score"), ("policy", "all_logits"))
    )
    width = BYTES[plan.compute_dtype]
    whole = width * shape.tokens * plan.model.vocab_size
    part = width * shape.rows * plan.response * plan.model.vocab_size
    row = part // shape.rows
    logits = Term(
        *("logits", "policy", whole),
        f"{shape.tokens:,} x {plan.model.vocab_size:,} x {width} B: the output stays",
    )
    saved = Term("log-softmax", "policy", part if width < 4 else 0, "of 16-bit logits, row by row")
    older = _gradients(scene, "critic", again) + _gradients(scene, "policy", again)
    former: Terms = ()
    if plan.minibatch > plan.micro_batch:  # a minibatch's end lets go of all
        former = (Term("probabilities", "policy", part, "of the micro-batch before"),)
    last = (*former, *_output(policy, shape), logits)

    resident = (*scene.resident("update.forward"), *older)
    moments = [
        *_running(critic, (*resident, *(last if former else ()))),
        *_running(policy, (*resident, *_whole(critic), *_output(critic, shape),
                           *(last if former else ()))),
    ]  # fmt: skip
    yield Phase("update.forward", tuple(moments))

    both = (*_whole(critic), *_whole(policy), *_beside(policy), logits, *former)
    row_term = Term("logits", "policy", row, "one row, less its largest: logsumexp")
    resident = (*scene.resident("update.loss"), *older, *both, saved)
    moments = [Moment("log-probabilities", (*resident, row_term))]
    if former:  # until they are replaced
        moments.append(Moment("logits", (*scene.resident("update.loss"), *older, *both, logits)))
    yield Phase("update.loss", tuple(moments))

    resident = (*scene.resident("update.backward"), *older)
    twice = Term(
        *("logits gradient", "policy", 2 * whole + 2 * part),
        "logits were divided in place: twice whole, twice the response's",
    )
    moments = [Moment("logits", (*resident, *both, twice))]
    out = (*_output(policy, shape), logits, *former)
    moments += _backward(policy, (*resident, *_whole(critic)), out)
    done = _gradients(scene, "policy", not again)
    moments += _backward(critic, (*resident, *out, *done), ())
    yield Phase("update.backward", tuple(moments))

    gradients = _gradients(scene, "critic", True) + _gradients(scene, "policy", True)
    size = sum(memory.step_temporary(g.role, plan.optimizer, False)[0] for g in (critic, policy))
    stays = (*scene.resident("update.step"), *gradients, *out)
    temporary = Term("optimizer temporary", "policy", size, "policy and critic in one step")
    yield Phase("update.step", (Moment("optimizer step", (*stays, temporary)),))

    stays = (*scene.resident("update.statistics"), *(gradients if again else ()))
    probabilities = Term(
        "probabilities", "policy", 2 * part, "softmax, and its product with logits"
    )
    yield Phase("update.statistics", (Moment("entropy", (*stays, *out, probabilities)),))


def _graph(scene: Scene, role: str, shape: Shape, head: str, again: bool) -> Graph:
    who, how, plan = scene.roles[role], scene.setting(role), scene.plan
    stages = activations.update_stages(
        *(who.model, how, shape, head, plan.checkpointing), accumulate=again
    )
    kept = next(stage.activations for stage in stages if stage.phase == "backward")
    outputs, beside = outputs_held(who.model, how, shape)
    if plan.checkpointing:  # as if it were obeyed: no cache, and hidden states are the checkpoints
        outputs, beside = _hidden_states(scene, role, shape, who.model.num_layers).bytes, 0
    return Graph(who, stages, kept, outputs, beside)


@lru_cache(maxsize=1024)
def outputs_held(model: Model, setting: Setting, shape: Shape) -> tuple[int, int]:
    """(bytes of all hidden states and the cache, those that no graph holds anyway).

    A layer is played once more with its input and its keys and values held.
    """
    outputs = beside = 0
    for count, how, piece in groups(model, setting, shape.length):
        tape = Tape(grad=True)
        block = Decoder(tape, model, how, shape.rows, shape.length)
        block.cache = []
        x = tape.new(shape.tokens * model.hidden_size * how.stream, how.stream, grad=True)
        y = getattr(block, piece)(x)
        tape.region.clear()
        del y
        outputs += count * (x.bytes + sum(part.bytes for part in block.cache))
        beside += count * (tape.live - training_cost(model, how, shape, piece).kept)
    return outputs, beside


def _running(graph: Graph, stays: Terms) -> Iterator[Moment]:
    """The moments of a forward pass whose outputs are all kept."""
    name = graph.role.name
    for stage in graph.stages:
        if stage.phase == "forward":
            yield Moment(
                f"{name}: {stage.name}",
                (
                    *(*stays, *_beside(graph)),
                    Term(
                        "activations", name, stage.activations, "saved for backward in each layer"
                    ),
                    Term("layer activations", name, stage.working, "of the piece that runs"),
                ),
            )


def _backward(graph: Graph, stays: Terms, out: Terms) -> list[Moment]:
    """The moments of a backward pass; `out`: outputs of the forward that outlive it."""
    name, moments = graph.role.name, []
    for stage in graph.stages:
        if stage.phase == "backward":
            whole = stage.name in ("logits", "last layer")
            # Hidden states that the graph holds too are not there twice.
            held = (*_beside(graph), *out[1:]) if out and whole else out
            moments.append(
                Moment(
                    f"{name}: {stage.name}",
                    (
                        *(*stays, *held),
                        Term("activations", name, stage.activations, "saved for backward"),
                        Term("layer activations", name, stage.working, "of the piece that runs"),
                        Term("gradients", name, stage.gradients, "made so far in this backward"),
                    ),
                )
            )
    return moments


def _whole(graph: Graph) -> Terms:
    why = f"saved for backward in each of {graph.role.model.num_layers} layers (no checkpointing)"
    return (Term("activations", graph.role.name, graph.kept, why),)


def _output(graph: Graph, shape: Shape) -> Terms:
    why = (
        f"hidden states of {graph.role.model.num_layers} layers and the cache of {shape.rows} rows"
    )
    return (Term("hidden states, cache", graph.role.name, graph.outputs, why),)


def _beside(graph: Graph) -> Terms:
    why = "what of them the graph does not hold anyway"
    return (Term("hidden states, cache", graph.role.name, graph.beside, why),)


def _gradients(scene: Scene, role: str, there: bool) -> Terms:
    return scene.stays("gradients", scene.roles[role]) if there else ()


def _generate(scene: Scene, rows: int, before: Terms = (), drawn: Terms = ()) -> Iterator[Phase]:
    """transformers' generate; a step's logits and probabilities stay while the next one runs."""
    plan, tokens = scene.plan, scene.plan.prompt + scene.plan.response
    width = BYTES[plan.compute_dtype]
    cache = _cache(scene, "policy", rows, plan.prompt)
    shape = Shape(rows, plan.prompt)
    yield scene.forward("rollout.prefill", "policy", shape, "last_logits", (*before, cache))
    growth = memory.kv_growth(plan.model, rows, tokens, width)
    extra = (
        *(*before, *drawn, _cache(scene, "policy", rows, tokens)),
        Term("cache growth", "policy", growth, "the old K of a layer beside its longer copy"),
        Term(
            *("logits", "policy", 2 * 4 * rows * plan.model.vocab_size),
            "the step before: its logits and probabilities in fp32",
        ),
    )
    shape = Shape(rows, 1, past=tokens)
    yield scene.forward("rollout.decode", "policy", shape, "last_logits", extra)


def _cache(scene: Scene, role: str, rows: int, tokens: int) -> Term:
    model, width = scene.roles[role].model, BYTES[scene.plan.compute_dtype]
    size = memory.kv_cache(model, rows, tokens, width)
    return Term("KV cache", role, size, lambda: memory.kv_why(model, rows, tokens, width))


def _hidden_states(scene: Scene, role: str, shape: Shape, layers: int) -> Term:
    model, how = scene.roles[role].model, scene.setting(role)
    size = layers * shape.tokens * model.hidden_size * how.stream
    why = f"{layers} layers x {shape.tokens:,} x {model.hidden_size:,} x {how.stream} B: kept"
    return Term("hidden states", role, size, why)


def _tokens(count: int) -> Term:
    return Term("token ids and masks", "batch", 16 * count, f"{count:,} tokens x 16 B")


METHODS = {f.__name__: f for f in (sft, dpo, reward, grpo, ppo)}
