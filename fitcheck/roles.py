"""From a Plan to its roles: which models are held, in which types, and how each is run."""

from __future__ import annotations

from fitcheck import kernels
from fitcheck.flows import FLOWS
from fitcheck.memory import Role
from fitcheck.model import Model
from fitcheck.ops import Setting
from fitcheck.plan import Plan

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def roles(plan: Plan) -> dict[str, Role]:
    """The models of a plan by role, in the field's order: policy, reference, reward, critic."""
    if plan.method == "inference":
        stored = stored_as(plan.model, plan.quant)
        return {"policy": Role("policy", plan.model, BYTES[plan.compute_dtype], stored=stored)}
    found = {"policy": _trained(plan, "policy", plan.model, plan.tuning, _policy_head(plan))}
    compute = BYTES[plan.compute_dtype]
    if plan.reference == "copy":
        own = BYTES[plan.weight_dtype] if plan.recipe == "trl" else compute
        found["reference"] = Role("reference", plan.model, own)
    if plan.reward_model == "adapter":
        found["reward"] = _on_policy(plan, "reward", tuning="")
    elif plan.reward_architecture is not None:
        stored = stored_as(plan.reward_architecture, plan.reward_precision)
        found["reward"] = Role(
            "reward", plan.reward_architecture, compute, stored=stored, head="score"
        )
    if plan.critic == "adapter":
        found["critic"] = _on_policy(plan, "critic", tuning="lora")
    elif plan.critic_architecture is not None:
        model = plan.critic_architecture
        found["critic"] = _trained(plan, "critic", model, plan.critic_tuning, "score")
    return found


def stored_as(model: Model, quant: str | None) -> str:
    """How bitsandbytes keeps linear weights: nf4, int8, or plain where it does not touch them."""
    flow = FLOWS.get(model.model_type)
    bound = quant in ("nf4", "int8") and not (flow is not None and flow.own_linear)
    return quant if bound and quant else "plain"


def _policy_head(plan: Plan) -> str:
    if plan.method == "reward":
        return "score"
    return "value" if plan.critic == "shared" else "lm"


def _trained(plan: Plan, name: str, model: Model, tuning: str, head: str) -> Role:
    if tuning == "full":
        return Role(name, model, BYTES[plan.weight_dtype], "full", head=head)
    quantized = tuning == "qlora"
    # TRL up to 0.13 casts a 4-bit base's embedding and head back to 16 bits and leaves norms in
    # fp32, so the residual stream alone is fp32 (trl/trainer/utils.py peft_module_casting_to_bf16).
    weights = plan.compute_dtype if quantized and plan.recipe == "hf-4.48" else plan.weight_dtype
    return Role(
        name,
        model,
        BYTES[weights],
        tuning,
        stored=stored_as(model, "nf4" if quantized else ""),
        head=head,
        adapter=BYTES[plan.adapter_precision],
        rank=plan.lora_rank,
        targets=plan.lora_targets,
    )


def _on_policy(plan: Plan, name: str, tuning: str) -> Role:
    """An adapter and a score head on the policy's frozen base."""
    return Role(
        name,
        plan.model,
        BYTES[plan.weight_dtype],
        tuning,
        stored=stored_as(plan.model, "nf4" if plan.tuning == "qlora" else ""),
        head="score",
        base=False,
        adapter=BYTES[plan.adapter_precision],
        rank=plan.lora_rank,
        targets=plan.lora_targets,
    )


def setting(plan: Plan, role: Role, adapters: bool = True) -> Setting:
    """How a role's layers run; adapters=False is the policy with its adapter off."""
    masked = plan.padding == "padded" and plan.attention != "flash"
    dim = role.model.head_dim or 0
    dtype, choice = plan.compute_dtype, plan.attention
    flow = FLOWS.get(role.model.model_type)
    if choice == "sdpa" and flow is not None and flow.kernel:
        choice = flow.kernel
    weight = role.weight
    stream = 4 if plan.precision.endswith("-mixed") and role.tuning else weight
    if plan.sharding == "fsdp" and plan.autocast:  # MixedPrecision: layers see 16-bit weights only
        weight = stream = min(weight, BYTES[dtype])
    return Setting(
        compute=BYTES[dtype],
        weight=weight,
        autocast=plan.autocast,
        # TRL's reference is never told that it is frozen, so autocast keeps casts of its weights.
        trains=role.tuning == "full" or (plan.recipe == "trl" and role.name == "reference"),
        head_trains=bool(role.tuning),
        kernel=kernels.attention_kernel(plan.gpu, dtype, masked, dim, choice),
        masked=masked,
        stream=stream,
        masked_kernel=kernels.attention_kernel(plan.gpu, dtype, True, dim, choice),
        stored=role.stored,
        adapter=role.adapter if adapters else 0,
        rank=role.rank,
        targets=role.targets,
        dropout=plan.recipe == "hf-4.48",
        kernel_head=plan.recipe == "trl",
        card=kernels.card(plan.gpu),
    )
