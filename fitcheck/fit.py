"""fit(plan) -> Report: the estimate. Pure arithmetic: no files, no device, under a millisecond."""

from __future__ import annotations

from dataclasses import replace

from fitcheck import coefficients, kernels, links
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.flows import FLOWS
from fitcheck.host import ram
from fitcheck.phases import phases
from fitcheck.plan import Plan
from fitcheck.report import Error, Report
from fitcheck.roles import roles, setting
from fitcheck.speed import step_speed, timed
from fitcheck.traps import traps


def fit(plan: Plan, error: Error | None = None, seconds: bool = True) -> Report:
    """What one step of the plan takes, phase by phase.

    error: how far off estimates were in recorded measurements (fitcheck.accuracy knows).
    seconds: whether the phases carry theirs, a third of the work.
    Raises FitCheckError for an architecture that the formulas do not cover.
    """
    for model, tuning in (
        (plan.model, plan.tuning or ""),
        (plan.reward_architecture, ""),
        (plan.critic_architecture, plan.critic_tuning or ""),
    ):
        if model is not None and (why := covered(model, tuning, plan.lora_targets or "all-linear")):
            raise FitCheckError(
                f"{model.id}: the estimate does not cover {why}",
                "`fitcheck dryrun` traces it, where torch is installed"
                if model.is_read
                else "choose another model; `fitcheck models` marks what is covered",
            )
    found = phases(plan)
    if seconds:
        found = timed(plan, found)
    report = Report(
        *(plan, found, ram(plan)),
        error=error,
        notes=tuple(notes(plan)),
        speed=step_speed(plan, found),
    )
    if error is None or not (known := unknown_kernel(plan)):
        return report
    return replace(report, error=widened(error, known, report))


def widened(error: Error, known: str, report: Report) -> Error:
    """The stated error and, since nobody knows it, the whole workspace of the attention kernel."""
    plan = report.plan
    how, model = setting(plan, roles(plan)["policy"]), plan.model
    pairs = 2 if plan.method in ("dpo", "reward") else 1
    rows = plan.concurrency if plan.method == "inference" else pairs * plan.micro_batch
    heads, kv_heads = model.num_attention_heads or 0, model.num_key_value_heads or 0
    dim = model.head_dim or 0
    call = kernels.Call(rows, plan.tokens, plan.tokens, heads, kv_heads, dim, dim, how.compute)
    extra = kernels.attention_backward("flash", call, how.card) / report.peak_bytes
    basis = f"{error.basis}; widened by {100 * extra:.1f} %: {known}"
    return error._replace(relative=round(error.relative + extra, 4), basis=basis)


def notes(plan: Plan) -> list[str]:
    """What the reader must know about this answer: doubts, stand-ins, what is not modelled."""
    found = []
    for row in (plan.model, plan.reward_architecture, plan.critic_architecture):
        if row is not None and row.doubt:
            found.append(f"{row.id} is {row.doubt}")
        if row is not None and coefficients.is_recurrent(row):
            found.append(
                f"{row.id}: its recurrent layers are counted as transformers runs them without "
                "mamba-ssm, causal-conv1d and flash-linear-attention; with those it is otherwise"
            )
    if plan.gpu.doubt:
        found.append(f"{plan.gpu.name}: unverified {plan.gpu.doubt}")
    training = plan.method != "inference"
    found += side_by_side(plan)
    if training and plan.gpu.vendor in ("apple", "intel"):
        vendor = plan.gpu.vendor.title()
        found.append(f"training on {vendor} is not modelled: CUDA's figures stand in")
    elif known := unknown_kernel(plan):
        found.append(known)
    if plan.model.params_vision_audio:
        found.append("text only: images and sound, and their activations, are not modelled")
    if training and plan.model.moe and plan.tuning != "full":
        found += expert_notes(plan)
    if "qlora" in (plan.tuning, plan.critic_tuning) or plan.quant in ("nf4", "int8"):
        flow = FLOWS.get(plan.model.model_type)
        if flow is not None and flow.own_linear:
            found.append("its own linear layers stay in 16 bits: transformers quantizes nn.Linear")
    found += traps(plan)
    return list(dict.fromkeys(found))


def side_by_side(plan: Plan) -> list[str]:
    """What is assumed of several cards."""
    if plan.gpus == 1:
        return []
    if plan.method == "inference":
        return [f"each of {plan.gpus} cards runs a copy of its own, with its part of the sequences"]
    speed = links.link_bandwidth(plan.gpu, plan.gpus) / 1e9
    found = [
        f"what each of {plan.gpus} equal cards holds; only FSDP on two was held against runs",
        f"cards talk over {links.link_name(plan.gpu, plan.gpus)} at {speed:.0f} GB/s each way",
    ]
    if plan.sharding.startswith("zero") and plan.tuning == "full" and plan.weight_dtype == "fp32":
        found.append("DeepSpeed's own regime is --precision bf16-master")
    if plan.sharding == "fsdp":
        found.append(
            "FSDP scatters the gradients of each micro-batch (accelerate: sync_each_batch); "
            "under no_sync a card holds all of them"
        )
    if plan.rollout in ("vllm", "sglang"):
        found.append(f"each card runs a {plan.rollout} of its own")
    return found


def unknown_kernel(plan: Plan) -> str:
    """Why the attention kernel's memory is not certain on this card; empty when it is."""
    how = setting(plan, roles(plan)["policy"])
    return kernels.attention_known(plan.gpu, how.kernel)


def expert_notes(plan: Plan) -> list[str]:
    """What LoRA and 4 bits do to the stacked experts of a mixture."""
    found = []
    flow = FLOWS.get(plan.model.model_type)
    if plan.tuning == "qlora":
        found.append("stacked experts stay in 16 bits: bitsandbytes quantizes linear layers alone")
    if flow is not None and flow.adapted_experts and plan.lora_targets == "all-linear":
        found.append("PEFT's all-linear adapts the stacked experts too, at the size of all of them")
    return found
