"""The seconds of each phase of a plan, by phases' names: speed.py puts them into Reports.

A step's phases pass over its sequences in passes (passes.py) of so many FLOPs and bytes (work.py).
What the host needs to launch an eager pass is its least time.
"""

from __future__ import annotations

from collections.abc import Callable

from fitcheck import links, memory, quants, shards
from fitcheck.memory import Role
from fitcheck.passes import Step, decode_step, llama_cpp_prefill, pass_seconds
from fitcheck.plan import CHECKPOINT, ROLLOUT, Plan
from fitcheck.rates import bandwidth, engine
from fitcheck.roles import BYTES, roles
from fitcheck.work import Work, block_params, forward, head_flops, share_read

# Bytes a logit moves: 16-bit product, its fp32 copy, log-softmax; and their gradients.
LOGIT_FORWARD, LOGIT_BACKWARD = 16, 20
# How often foreach AdamW moves as much as the weights, kernel after kernel: decay 2, lerp 3, mul 2,
# addcmul 3, sqrt 2, div 2, add 2, addcdiv 4. Other optimizers read and write each state once.
FOREACH_PASSES = 20
CPU_ADAM = 28  # bytes a parameter: fp32 weight, two states, read and written; gradient, copy
HOST_MEMORY = 50e9  # bytes a second that Adam on the CPU gets (assumed: two channels of DDR5)
GAE_CALLS = 6 / 30  # kernels a token of GAE's loop, in layers' worth of kernels


def inference_engine(plan: Plan) -> str:
    """Whose speed these weights run at: llama.cpp's, an eager loop's, or that of CUDA graphs."""
    held = plan.model.checkpoint if plan.quant == CHECKPOINT else None
    if plan.engine in ("vllm", "sglang"):
        return "graphs"
    if plan.engine == "llama.cpp":
        return "llama.cpp"
    if plan.quant in ("nf4", "int8") or (held and "bitsandbytes" in held.quantization):
        return "eager"
    return "graphs" if plan.gpu.vendor in ("nvidia", "amd") else "llama.cpp"


class Clock:
    """Seconds of the phases of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.gpu = plan, plan.gpu
        self.roles = roles(plan)
        self.speed = bandwidth(plan.gpu) or 1.0

    def seconds(self, phase: str) -> float | None:
        if phase == "load":
            return None
        name, _, part = phase.partition(".")
        if name in ("prefill", "decode"):
            return _inference(self.plan, name)
        if name == "rollout":
            return self.rollout(part)
        if name == "score":
            return self.score(part)
        if name == "advantages":
            loop = self.plan.response if self.plan.method == "ppo" else 1
            return loop * GAE_CALLS * engine("eager").layer
        role, _, stage = part.rpartition(".")
        if stage == "statistics":  # softmax, its product with the logits, two sums
            return 6 * self.plan.epochs * self.scores(BYTES[self.plan.compute_dtype]) / self.speed
        if not role and "critic" in self.roles:  # one update of both (trl)
            return self.update("policy", stage) + self.update("critic", stage)
        return self.update(role or "policy", stage)

    def scores(self, width: int) -> int:
        """Bytes of a rollout's scores of the whole vocabulary."""
        plan = self.plan
        return self.share(plan.batch) * plan.response * (plan.model.vocab_size or 0) * width

    def share(self, number: int) -> int:
        """What one card does of what all cards do together: each its part of the batch."""
        return self.plan.on_card(number)

    def rollout(self, part: str) -> float:
        """Of all rows at once; trl's PPO rolls out `score_batch` of them at a time."""
        plan, rows = self.plan, self.share(self.plan.batch)
        if part == "scores":  # stacked, then copied together
            return 4 * self.scores(4) / self.speed
        if plan.recipe == "trl" and plan.method == "ppo":
            return -(-rows // plan.score_batch) * self.generation(part, plan.score_batch)
        return self.generation(part, rows)

    def generation(self, part: str, rows: int) -> float:
        plan, model = self.plan, self.plan.model
        prompt = self.forward_pass("policy", rows, plan.prompt)
        if part == "prefill":
            return self.launched(prompt, "policy", 1)
        name = "graphs" if plan.rollout in ("vllm", "sglang") else "eager"
        width = BYTES[plan.compute_dtype]
        who = self.roles["policy"]
        nf4 = who.stored == "nf4" and name == "eager"
        weights = memory.total(memory.weight_sizes(who)) if nf4 else model.params * width
        middle = plan.prompt + plan.response // 2
        step = Step(
            model,
            rows,
            weights * share_read(model, rows),
            memory.kv_cache(model, rows, middle, width),
            plan.compute_dtype,
            nf4=nf4,
        )
        if nf4 and rows > 1:  # bitsandbytes writes 16-bit weights, then multiplies
            step = step._replace(weight_bytes=step.weight_bytes + 2 * width * block_params(model))
        decode = plan.response * decode_step(self.gpu, name, step)
        return decode if part else prompt + decode + 2 * model.params * width / self.speed

    def score(self, role: str) -> float:
        plan = self.plan
        if role == "policy" and plan.recipe == "trl" and plan.method == "ppo":
            return 3 * self.scores(4) / self.speed  # of what the rollout kept: no pass of the model
        who = role if role in self.roles else "policy"
        rows, chunks = self.share(plan.batch), self.share(plan.batch // plan.score_batch)
        if plan.method == "dpo":
            rows, length, positions = 2 * rows, plan.sequence, plan.sequence
        else:
            length, positions = plan.prompt + plan.response, plan.response
        seconds = self.forward_pass(who, rows, length, chunks)
        if self.roles[who].head in ("lm", "value") or role == "reference":
            seconds += self.logits(rows * positions)
        return self.launched(seconds, who, chunks) + self.moved_in(role)

    def moved_in(self, role: str) -> float:
        """An offloaded role comes over PCIe for its phase."""
        if role not in (self.plan.offload or ()):
            return 0.0
        size = memory.total(memory.weight_sizes(self.roles[role]))
        return size / links.host_bandwidth(self.gpu)

    def forward_pass(self, role: str, rows: int, tokens: int, chunks: int = 1) -> float:
        """A forward of `rows` sequences in `chunks` equal parts."""
        who = self.roles[role]
        read, moved = self.weight_traffic(who)
        work = forward(who.model, rows, tokens)
        read, moved = read * chunks, moved * chunks
        seconds = pass_seconds(self.gpu, self.plan.compute_dtype, work, read, moved)
        return max(seconds, chunks * self.gathering(who))

    def weight_traffic(self, who: Role) -> tuple[float, float]:
        """(bytes that products read, bytes that casts and unpacking move) in one pass."""
        width, count = BYTES[self.plan.compute_dtype], block_params(who.model)
        every = max(count, who.model.params - who.model.params_embedding)  # of a mixture all
        if who.stored != "plain":
            return float(every * width), float(every * (width + 0.5 * (who.stored == "nf4")))
        cast = who.weight + width if who.weight != width else 0
        return float(every * width), float(every * cast)

    def logits(self, positions: int, passes: int = 1, moved: int = LOGIT_FORWARD) -> float:
        model, plan = self.plan.model, self.plan
        work = Work(passes * head_flops(model, positions), 0.0, 0.0)
        size = 0 if plan.loss == "fused" else moved * positions * (model.vocab_size or 0)
        return pass_seconds(self.gpu, plan.compute_dtype, work, moved=size)

    def launched(self, seconds: float, role: str, passes: float) -> float:
        """At least what the host takes to launch the kernels of that many passes."""
        who = self.roles[role]
        how = engine("eager")
        layer = how.layer_nf4 if who.stored == "nf4" else how.layer
        return max(seconds, passes * layer * (who.model.num_layers or 0))

    def update(self, role: str, stage: str) -> float:
        """One stage of all updates of a step: every epoch, minibatch and micro-batch."""
        plan = self.plan
        if plan.method in ROLLOUT:
            per, length, repeats = 1, plan.prompt + plan.response, plan.epochs
            steps = plan.batch // plan.minibatch
        else:
            per, length, repeats = (1 if plan.method == "sft" else 2), plan.sequence, 1
            steps = 1
        rows, micro = plan.batch, plan.batch // plan.micro_batch
        if plan.ptx_batch and role == "policy":  # so many more in every minibatch
            rows += steps * plan.ptx_batch
            micro += steps * -(-plan.ptx_batch // plan.micro_batch)
        if stage == "step":
            return repeats * steps * self.optimizer_step(role)
        once = UPDATES[stage](self, role, per * self.share(rows), length, self.share(micro))
        return repeats * once + (self.moved_in(role) if stage == "forward" else 0.0)

    def update_forward(self, role: str, rows: int, length: int, micro: int) -> float:
        return self.launched(self.forward_pass(role, rows, length, micro), role, micro)

    def update_loss(self, role: str, rows: int, length: int, micro: int) -> float:
        return self.logits(self.positions(rows, length)) if self.has_logits(role) else 0.0

    def update_backward(self, role: str, rows: int, length: int, micro: int) -> float:
        """Gradients of inputs, in full training of weights; checkpointing runs layers again."""
        plan, who = self.plan, self.roles[role]
        again = 1 if plan.checkpointing else 0
        work = forward(who.model, rows, length)
        work = work.times((2 if who.tuning == "full" else 1) + again, 2 + again)
        read, moved = self.weight_traffic(who)
        unpacked = moved * (again + (who.stored == "nf4"))
        gradients = memory.total(memory.gradient_sizes(who)) * (1 if micro == 1 else 3)
        traffic = (unpacked + gradients) * micro
        seconds = pass_seconds(
            self.gpu, plan.compute_dtype, work, (1 + again) * read * micro, traffic
        )
        seconds = self.launched(seconds, role, (engine("eager").backward + again) * micro)
        if self.has_logits(role):
            again = 0 if plan.loss == "full" else 1
            positions = self.positions(rows, length)
            seconds += self.logits(positions, 1 + again + (who.tuning == "full"), LOGIT_BACKWARD)
        return max(seconds, self.communication(role, micro))

    def has_logits(self, role: str) -> bool:
        return self.roles[role].head in ("lm", "value")

    def positions(self, rows: int, length: int) -> int:
        """Positions projected to the vocabulary: all, or those of the responses."""
        response = self.plan.response
        return rows * (length if self.plan.loss == "full" or not response else response)

    def optimizer_step(self, role: str) -> float:
        """Bytes of weights, gradients and states over the bandwidth, by how the optimizer runs."""
        plan, who = self.plan, self.roles[role]
        cards = shards.cards(plan, shards.STATES)
        gradients = memory.total(memory.gradient_sizes(who)) / cards
        if "optimizer" in (plan.offload or ()):
            count = gradients / max(1, who.adapter or who.weight)
            host = HOST_MEMORY / plan.gpus  # all cards' Adams share it
            return 2 * gradients / links.host_bandwidth(self.gpu) + CPU_ADAM * count / host
        if plan.optimizer == "adamw":
            return FOREACH_PASSES * gradients / self.speed
        master = plan.precision == "bf16-master"
        states = memory.total(memory.state_sizes(who, plan.optimizer, master, paged=False))
        states += memory.total(memory.state_sizes(who, plan.optimizer, master, paged=True))
        return (3 * gradients + 2 * states / cards) / self.speed

    def gathering(self, who: Role) -> float:
        """Seconds in which weights that are split are put together once."""
        plan = self.plan
        if not shards.gathers(plan) or who.stored == "int8":
            return 0.0
        size = shards.gathered_bytes(who, shards.gathered_width(plan, who))
        return links.all_gather(size, plan.gpus, links.link_bandwidth(self.gpu, plan.gpus))

    def communication(self, role: str, micro: int) -> float:
        """Seconds of the collectives of a backward over several cards, run beside it.

        ddp and zero1 sum gradients once an optimizer step (reduce-scatter and all-gather); where
        gradients are split they are scattered after each micro-batch. zero2 gathers new weights;
        zero3 and fsdp gather them here as in each forward.
        """
        plan, who = self.plan, self.roles[role]
        if plan.gpus == 1:
            return 0.0
        link = links.link_bandwidth(self.gpu, plan.gpus)
        steps = plan.batch // plan.minibatch if plan.minibatch else 1
        part = links.all_gather(memory.total(memory.gradient_sizes(who)), plan.gpus, link)
        if shards.cards(plan, shards.GRADIENTS) == 1:
            return 2 * steps * part
        return micro * part + (
            micro * self.gathering(who) if shards.gathers(plan) else steps * part
        )


UPDATES: dict[str, Callable[[Clock, str, int, int, int], float]] = {
    "forward": Clock.update_forward,
    "loss": Clock.update_loss,
    "backward": Clock.update_backward,
}


def _inference(plan: Plan, part: str) -> float:
    model, name = plan.model, inference_engine(plan)
    if part == "prefill":
        if name == "llama.cpp":
            return llama_cpp_prefill(plan.gpu, model, plan.context)
        work = forward(model, 1, plan.context)
        read = quants.weight_bytes(model, plan.quant)
        return pass_seconds(plan.gpu, plan.compute_dtype, work, read)
    rows = plan.on_card(plan.concurrency)
    cache = memory.kv_cache(model, rows, plan.context, memory.KV_BYTES[plan.kv_cache])
    held = model.checkpoint if plan.quant == CHECKPOINT else None
    weights = quants.weight_bytes(model, plan.quant) * share_read(model, rows)
    step = Step(
        *(model, rows, weights, cache, plan.compute_dtype),
        k_quant="_k" in (held.quantization if held else plan.quant),
        nf4=plan.quant == "nf4",
    )
    return decode_step(plan.gpu, name, step)
