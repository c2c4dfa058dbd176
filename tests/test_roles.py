"""What a plan is built into: types, adapters, quantized layers, optimizers, mixed precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from fitcheck.bench.blockwise import dequantize_blocks, dynamic_code, quantize_blocks  # noqa: E402
from fitcheck.bench.configs import config_from, empty_module  # noqa: E402
from fitcheck.bench.optimizers import AdamW8bit, Lion, MasterWeights, optimizer_for  # noqa: E402
from fitcheck.bench.precision import MetaAutocast, autocast  # noqa: E402
from fitcheck.bench.quantized import Int8Linear, NF4Linear  # noqa: E402
from fitcheck.bench.steps import run_step  # noqa: E402
from fitcheck.bench.steps.batches import Batch  # noqa: E402
from fitcheck.bench.steps.logprobs import token_logprobs  # noqa: E402
from fitcheck.catalog import find_model, model_entries, models  # noqa: E402
from fitcheck.errors import FitCheckError  # noqa: E402
from fitcheck.flows import FLOWS  # noqa: E402
from fitcheck.memory import base_tensors  # noqa: E402
from fitcheck.model import VERIFIED, Model  # noqa: E402
from fitcheck.plan import OPTIMIZERS  # noqa: E402
from tests.record_layers import build, cut  # noqa: E402
from tests.tiny import CPU, META, MasksArePadded, built, tiny_model, tiny_plan  # noqa: E402

pytestmark = pytest.mark.oracle
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def types(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


def in_fp32(model: Model) -> Counter[tuple[int, ...]]:
    """Shapes of the weights that the estimate counts in fp32 whatever the model's type."""
    tensors = base_tensors(model, "lm")
    return Counter({shape: copies for shape, copies, _, wide in tensors if wide})


# Architectures

BUILT = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gpt_neo",
    "gptj",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "stablelm",
    "starcoder2",
    "olmo",
    "olmo2",
    "olmo3",
    "cohere",
    "cohere2",
    "granite",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "granitemoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "glm",
    "glm4",
    "glm4_moe",
    "smollm3",
    "nemotron",
    "gpt_bigcode",
    "exaone4",
    "apertus",
    "arcee",
    "seed_oss",
    "hunyuan_v1_dense",
    "ernie4_5",
    "phimoe",
]


def smallest(model_type: str) -> str:
    rows = [row for row in model_entries() if row["model_type"] == model_type and row["params"]]
    sure = [row for row in rows if row["status"] in VERIFIED]
    return str(min(sure, key=lambda row: row["params"])["id"])


@pytest.mark.parametrize("model_type", BUILT)
def test_architecture_has_the_parameters_of_its_row(model_type: str) -> None:
    model = find_model(smallest(model_type))
    for headless, expected in ((False, model.params), (True, model.backbone_params)):
        module = empty_module(model, bf16, None, headless)
        assert sum(p.numel() for p in module.parameters()) == expected
        wide = Counter(tuple(p.shape) for p in module.parameters() if p.dtype != bf16)
        assert wide == in_fp32(model)


MIXTURES = sorted({m.model_type for m in models() if m.moe and m.is_verified} & set(FLOWS))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_weights_kept_in_fp32_are_those_of_transformers(model_type: str) -> None:
    """Two layers of every mixture with a flow, in bf16: the same tensors stay in fp32."""
    model = cut(find_model(smallest(model_type)))
    module = build(model, bf16, "meta", "sdpa", "full")
    named = module.named_parameters()
    wide = Counter(tuple(p.shape) for path, p in named if p.dtype == fp32 and "vis" not in path)
    assert wide == in_fp32(model)


def test_other_architectures_are_refused_with_a_reason() -> None:
    kinds = {row["model_type"] for row in model_entries() if row["status"] in VERIFIED}
    for model_type in kinds - set(BUILT):
        try:
            empty_module(find_model(smallest(model_type)), bf16, None, headless=False)
        except FitCheckError as error:
            assert "cannot be built for a dry run: " in error.message and error.hint


def test_a_wrong_row_is_refused() -> None:
    model = tiny_model()
    wrong = type(model)(**{**{f: getattr(model, f) for f in model.__slots__}, "params": 1})
    with pytest.raises(FitCheckError, match="parameters, not 1"):
        empty_module(wrong, bf16, None, headless=False)


def test_layer_kinds_and_no_dropout() -> None:
    config = config_from(find_model("google/gemma-3-1b-it"))
    assert config.layer_types.count("full_attention") == 4
    assert config_from(find_model("openai-community/gpt2")).resid_pdrop == 0
    assert config_from(find_model("facebook/opt-125m")).dropout == 0


# Types by role


@pytest.mark.parametrize(
    ("precision", "trained", "frozen"),
    [("bf16", bf16, bf16), ("bf16-mixed", fp32, bf16), ("fp16-mixed", fp32, fp16)]
    + [("bf16-autocast", bf16, bf16), ("bf16-master", bf16, bf16), ("fp32", fp32, fp32)],
)
def test_types_by_role(precision: str, trained: Any, frozen: Any) -> None:
    roles = built(tiny_plan("ppo", precision=precision), META)
    assert types(roles.policy) == types(roles.critic) == {trained}
    assert types(roles.reference) == types(roles.reward) == {frozen}
    assert not any(p.requires_grad for p in roles.reference.parameters())
    assert not any(p.requires_grad for p in roles.reward.parameters())


def test_reference_is_a_copy_of_the_policy() -> None:
    for tuning in ("full", "lora"):
        roles = built(tiny_plan("dpo", reference="copy", tuning=tuning, precision="fp32"))
        ids = torch.randint(48, (2, 5))
        torch.testing.assert_close(roles.reference(ids).logits, roles.policy(ids).logits)


# Adapters


def test_lora_trains_rank_times_in_and_out() -> None:
    """The count of arXiv 2106.09685 for every linear layer of the blocks, in PEFT's fp32."""
    model = tiny_model()
    plan = tiny_plan("sft", model, tuning="lora", lora_rank=4)
    parameters = built(plan, META).policy_training.parameters
    q, kv, ffn, width = 64, 32, model.intermediate_size, model.hidden_size
    shapes = [(width, q), (width, kv), (width, kv), (q, width)] + 2 * [(width, ffn)]
    shapes.append((ffn, width))
    assert sum(p.numel() for p in parameters) == 2 * sum(4 * (i + o) for i, o in shapes)
    assert {p.dtype for p in parameters} == {fp32}


def test_lora_on_attention_alone() -> None:
    for name in ("meta-llama/Llama-3.2-1B", "openai-community/gpt2"):
        plan = tiny_plan("sft", tiny_model(name), tuning="lora", lora_targets="attention")
        paths = [p for p, _ in built(plan, META).policy.named_parameters() if "lora_A" in p]
        assert len(paths) == (8 if "llama" in name else 4)
        assert all("attn" in path for path in paths)


def test_the_base_is_what_remains_without_the_adapter() -> None:
    plan = tiny_plan("ppo", tuning="lora", precision="fp32")
    roles = built(plan)
    batch = Batch(torch.randint(48, (2, 7)))
    base = built(tiny_plan("ppo", precision="fp32")).policy  # the same seed, no adapter
    expected = token_logprobs(base, batch, 1, "full")
    for parameter in roles.policy_training.parameters:
        nn.init.normal_(parameter)
    adapted = token_logprobs(roles.policy, batch, 1, "full")
    assert not torch.allclose(adapted, expected, atol=1e-2)
    with roles.acting("reference"):
        torch.testing.assert_close(token_logprobs(roles.policy, batch, 1, "full"), expected)
    torch.testing.assert_close(token_logprobs(roles.policy, batch, 1, "full"), adapted)


def test_roles_on_one_base_train_apart() -> None:
    plan = tiny_plan("ppo", tuning="lora", critic="adapter", reward_model="adapter")
    roles = built(plan)
    policy, critic = roles.policy_training.parameters, roles.critic_training.parameters
    assert not {id(p) for p in policy} & {id(p) for p in critic}
    trained = {id(p) for p in chain(policy, critic)}
    rest = [p for p in roles.policy.parameters() if id(p) not in trained]
    before = [p.detach().clone() for p in rest]
    moved = [p.detach().clone() for p in chain(policy, critic)]
    run_step(plan, roles)
    assert all(torch.equal(x, y) for x, y in zip(rest, before, strict=True))
    changed = [not torch.equal(x, y) for x, y in zip(chain(policy, critic), moved, strict=True)]
    assert sum(changed) >= len(changed) // 2  # LoRA's A has no gradient while B is 0


def test_the_head_of_a_critic_always_trains() -> None:
    roles = built(tiny_plan("ppo", critic_tuning="lora"))
    assert any(p is roles.critic.head.weight for p in roles.critic_training.parameters)
    shared = built(tiny_plan("ppo", critic="shared", tuning="lora"))
    assert any(p is shared.value_head.weight for p in shared.policy_training.parameters)
    assert shared.critic is None and shared.critic_training is None


# Quantized layers


def test_nf4_as_bitsandbytes_has_it() -> None:
    """Recorded from bitsandbytes 0.50.2: quantize_4bit(w, 64, compress_statistics, "nf4")."""
    weight = torch.linspace(-1, 1, 768).view(6, 128).sin() * torch.linspace(0.1, 2, 6)[:, None]
    layer = NF4Linear(weight, None, fp32)
    assert layer.weight.shape == (384, 1) and int(layer.weight.sum()) == 48484
    assert layer.absmax.tolist() == [41, 40, 54, 50, 53, 45, 49, 61, 197, 212, 242, 255]
    assert float(layer.offset) == pytest.approx(0.5546767115592957)
    assert layer.scale.tolist() == pytest.approx([1.128265142440796])
    assert float(layer.dequantized().double().sum()) == pytest.approx(268.33128800429404)


def test_nf4_takes_half_a_byte_and_its_scales() -> None:
    """0.5 + 1/64 + 4/(64 x 256) bytes a weight (arXiv 2305.14314), besides a mean and a code."""
    for device in (CPU, META):
        layer = NF4Linear(torch.randn(256, 128, device=device), None, bf16)
        held = [*layer.parameters(), *layer.buffers()]
        size = sum(t.numel() * t.element_size() for t in held)
        assert size == 256 * 128 * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4 + 16 * 4


@pytest.mark.parametrize("tokens", [3, 40])  # with few, bitsandbytes does not dequantize
def test_nf4_product_and_its_gradient(tokens: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    layer = NF4Linear(weight, nn.Parameter(torch.randn(24), False), fp32)
    x, slope = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 24)
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, layer.dequantized(), layer.bias))
    out.backward(slope)
    torch.testing.assert_close(x.grad, slope @ layer.dequantized())
    error = (layer.dequantized() - weight).pow(2).mean().sqrt()
    assert error < 0.11  # of a standard deviation, for normal weights


def test_nf4_saves_nothing_for_backward() -> None:
    layer = NF4Linear(torch.randn(24, 64), None, fp32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(40, 64, requires_grad=True))
    assert saved == []


def test_int8_product() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(2, 20, 64)
    bias = nn.Parameter(torch.randn(32), False)
    layer = Int8Linear(weight, bias, fp32)
    assert layer.weight.dtype == torch.int8 and layer.scale.shape == (32,)
    exact = F.linear(x, weight, bias)
    assert (layer(x) - exact).std() < 0.02 * exact.std()


def test_qlora_quantizes_the_blocks_alone() -> None:
    for device in (CPU, META):
        policy = built(tiny_plan("sft", tuning="qlora"), device).policy
        layers = [m for m in policy.modules() if isinstance(m, NF4Linear)]
        assert len(layers) == 2 * 7
        others = {p: t.dtype for p, t in policy.named_parameters() if "layers" not in p}
        assert set(others.values()) == {bf16} and len(others) == 2
        norms = [t for p, t in policy.named_parameters() if "norm" in p]
        assert norms and all(t.dtype == bf16 for t in norms)


def test_what_is_not_quantized_is_initialized() -> None:
    """A quantized model is built from shapes; its rotary angles and norms must be real."""
    ids = torch.randint(48, (2, 6))
    quantized = built(tiny_plan("sft", tuning="qlora", precision="fp32")).policy
    plain = built(tiny_plan("sft", precision="fp32")).policy
    torch.testing.assert_close(quantized.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    torch.testing.assert_close(quantized.model.norm.weight, torch.ones(64))
    assert 0.1 < quantized(ids).logits.std() / plain(ids).logits.std() < 10


def test_blockwise_quantization_by_hand() -> None:
    code = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    indices, maxima = quantize_blocks(torch.tensor([2.0, -0.9, 0.4, 0.0, 6.0]), code, 4)
    assert indices.tolist() == [4, 1, 2, 2, 4] and maxima.tolist() == [2, 6]
    assert dequantize_blocks(indices, maxima, code, 4).tolist() == [2, -1, 0, 0, 6]


def test_dynamic_code_is_as_dense_as_its_numbers_are_large() -> None:
    for signed in (True, False):
        code = dynamic_code(signed)
        assert len(code) == 256 and (code.diff() > 0).all() and code[-1] == 1 and 0 in code
        assert float(code.min()) == pytest.approx(-0.99296875 if signed else 0)


# Optimizers

RATES = {"lion": 3e-2, "sgd": 3.0, "adafactor": 0.05, "muon": 0.3}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-master"])
def test_every_optimizer_learns(name: str, precision: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 96)
    y = x @ torch.randn(96, 64)
    net = nn.Linear(96, 64).to(fp32 if precision == "fp32" else bf16)
    plan = tiny_plan("sft", optimizer=name, precision=precision)
    optimizer = optimizer_for(plan, list(net.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = RATES.get(name, 0.05)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(net(x.to(net.weight.dtype)).float(), y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert losses[-1] < losses[0] / 2
    assert net.weight.grad is None


def states(optimizer: Any) -> int:
    """Bytes of the tensors that an optimizer keeps."""
    held = chain.from_iterable(state.values() for state in optimizer.state.values())
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("adamw", 2 * 4 * 8192 + 4),  # with a counter on the host
        ("adamw-fused", 2 * 4 * 8192 + 4),
        ("adamw-8bit", 2 * 8192 + 2 * 4 * 8192 // 256),
        ("lion", 4 * 8192),
        ("sgd", 0),
    ],
)
@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_states_of_optimizers(name: str, size: int, device: torch.device) -> None:
    parameter = nn.Parameter(torch.zeros(64, 128, device=device))
    optimizer = optimizer_for(tiny_plan("sft", optimizer=name, precision="fp32"), [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert states(optimizer) == size


def test_small_states_stay_in_fp32_and_paged_ones_leave_the_card() -> None:
    small = nn.Parameter(torch.zeros(4095, device=META))
    large = nn.Parameter(torch.zeros(102_400, device=META))
    optimizer = AdamW8bit([small, large], paged=True)
    for parameter in (small, large):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert states(optimizer) == 2 * 4 * 4095 + 2 * 4 * 102_400 // 256


def trajectory(make: Callable[[list[nn.Parameter]], Any], lr: float) -> Tensor:
    """Where three gradients take 5000 weights; those for which bitsandbytes' were recorded."""
    weight = nn.Parameter(torch.linspace(-1, 1, 5000))
    optimizer = make([weight])
    optimizer.param_groups[0]["lr"] = lr
    for i in range(3):
        weight.grad = torch.linspace(-3, 3, 5000).sin() * (i + 1)
        optimizer.step()
    return weight.detach()


def test_adamw_8bit_as_bitsandbytes_has_it() -> None:
    """Recorded from bitsandbytes 0.50.2; the path of 32-bit AdamW is close to it."""
    found = trajectory(AdamW8bit, 1e-2)
    recorded = [-0.97057003, -0.57070935, -0.17060764, 0.17100123, 0.57104743]
    assert found[::1000].tolist() == pytest.approx(recorded, abs=1e-6)
    moved = float((found - torch.linspace(-1, 1, 5000)).abs().sum())
    assert moved == pytest.approx(146.11965942382812, rel=1e-4)
    exact = trajectory(lambda p: torch.optim.AdamW(p, weight_decay=0.0), 1e-2)
    assert (found - exact).abs().mean() < 1e-3


def test_lion_takes_steps_of_one_size() -> None:
    found = trajectory(Lion, 0.25) - torch.linspace(-1, 1, 5000)
    torch.testing.assert_close(found.abs(), torch.full_like(found, 0.75))


def test_master_weights_keep_what_16_bits_lose() -> None:
    """A hundred steps of 1e-4 from 1 move an fp32 weight; in bf16 each is rounded away."""
    weight = nn.Parameter(torch.ones(3, dtype=bf16))
    plain = nn.Parameter(torch.ones(3, dtype=bf16))
    master = MasterWeights([weight], lambda p: torch.optim.SGD(p, lr=1e-4))
    sgd = torch.optim.SGD([plain], lr=1e-4)
    for _ in range(100):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        master.step()
        sgd.step()
    assert plain.tolist() == [1, 1, 1]
    assert weight.tolist() == pytest.approx([0.99] * 3, abs=4e-3)
    assert master.copies[0].tolist() == pytest.approx([0.99] * 3, abs=1e-5)
    assert weight.dtype == bf16 and all(copy.grad is None for copy in master.copies)


# Offload


def test_what_is_in_ram_is_not_on_the_card() -> None:
    roles = built(tiny_plan("ppo", offload=("reference", "critic")), META)

    def held(module: nn.Module) -> int:
        return sum(p.untyped_storage().nbytes() for p in module.parameters())

    for role in ("reference", "critic"):
        module = getattr(roles, role)
        shapes = [p.shape for p in module.parameters()]
        count = len(shapes)
        assert held(module) <= 4 * count
        with roles.acting(role):
            assert held(module) > 10_000 and [p.shape for p in module.parameters()] == shapes
        assert held(module) <= 4 * count


# Mixed precision on meta

# The type of the result for bf16 and for fp32 input, in an autocast region of the CUDA build of
# PyTorch 2.13.0.
LOW, HIGH, AS_GIVEN = (bf16, bf16), (fp32, fp32), (bf16, fp32)
RESULTS: dict[str, tuple[tuple[Any, Any], Callable[[Tensor], Tensor]]] = {
    "linear": (LOW, lambda v: F.linear(v, v)),
    "matmul": (LOW, lambda v: v @ v.t()),
    "mm": (LOW, lambda v: torch.mm(v, v.t())),
    "bmm": (LOW, lambda v: torch.bmm(v[None], v.t()[None])),
    "addmm": (LOW, lambda v: torch.addmm(v[:, :4], v, v.t())),
    "baddbmm": (LOW, lambda v: torch.baddbmm(v[None, :, :4], v[None], v.t()[None])),
    "einsum": (LOW, lambda v: torch.einsum("ij,kj->ik", v, v)),
    "prelu": (LOW, lambda v: F.prelu(v, v[0, :1])),
    "vecdot": (LOW, lambda v: torch.linalg.vecdot(v, v)),
    "attention": (LOW, lambda v: F.scaled_dot_product_attention(*[v[None, None]] * 3)),
    "rms_norm": (HIGH, lambda v: F.rms_norm(v, (8,))),
    "layer_norm": (HIGH, lambda v: F.layer_norm(v, (8,), v[0], v[1])),
    "group_norm": (HIGH, lambda v: F.group_norm(v, 2)),
    "softmax": (HIGH, lambda v: F.softmax(v, -1)),
    "log_softmax": (HIGH, lambda v: torch.log_softmax(v, -1)),
    "logsumexp": (HIGH, lambda v: torch.logsumexp(v, -1)),
    "cross_entropy": (HIGH, lambda v: F.cross_entropy(v, v[:, 0].long())),
    "softplus": (HIGH, F.softplus),
    "exp": (HIGH, torch.exp),
    "log": (HIGH, lambda v: v.log()),
    "rsqrt": (HIGH, torch.rsqrt),
    "pow": (HIGH, lambda v: v.pow(2)),
    "second power": (HIGH, lambda v: v**2),
    "square": (HIGH, torch.square),
    "power of 2": (HIGH, lambda v: 2**v),
    "reciprocal": (HIGH, torch.reciprocal),
    "sum": (HIGH, lambda v: v.sum(-1)),
    "cumsum": (HIGH, lambda v: v.cumsum(-1)),
    "norm": (HIGH, lambda v: v.norm(2, -1)),
    "vector_norm": (HIGH, lambda v: torch.linalg.vector_norm(v, 2, -1)),
    "mse_loss": (HIGH, lambda v: F.mse_loss(v, v)),
    "cosine": (HIGH, lambda v: F.cosine_similarity(v, v)),
    "cat with fp32": (HIGH, lambda v: torch.cat([v, v.float()])),
    "addcmul with fp32": (HIGH, lambda v: torch.addcmul(v, v, v.float())),
    "logsigmoid": (AS_GIVEN, F.logsigmoid),
    "mean": (AS_GIVEN, lambda v: v.mean(-1)),
    "var": (AS_GIVEN, lambda v: v.var(-1)),
    "tanh": (AS_GIVEN, torch.tanh),
    "silu": (AS_GIVEN, F.silu),
    "gelu": (AS_GIVEN, F.gelu),
    "cos": (AS_GIVEN, torch.cos),
    "sqrt": (AS_GIVEN, torch.sqrt),
    "sigmoid": (AS_GIVEN, torch.sigmoid),
    "dot": (AS_GIVEN, lambda v: torch.dot(v[0], v[0])),
    "cat": (AS_GIVEN, lambda v: torch.cat([v, v])),
    "mul": (AS_GIVEN, lambda v: v * v),
}


@pytest.mark.parametrize("name", RESULTS)
def test_autocast_on_meta_has_the_types_of_cuda(name: str) -> None:
    expected, function = RESULTS[name]
    for given, result in zip((bf16, fp32), expected, strict=True):
        with autocast(META, bf16):
            assert function(torch.empty(4, 8, dtype=given, device=META)).dtype == result


def test_a_trained_weight_is_cast_once_in_a_region() -> None:
    x = torch.empty(3, 8, device=META)
    trained, frozen = nn.Linear(8, 8, device=META), nn.Linear(8, 8, device=META)
    frozen.requires_grad_(False)
    with MetaAutocast(bf16) as region:
        for _ in range(2):
            trained(x), frozen(x)
        assert {id(weight) for weight, _ in region.casts.values()} == {
            id(p) for p in trained.parameters()
        }
        with MetaAutocast(bf16) as inner:
            assert inner.casts is region.casts
    assert region.casts == {}


class Operators(TorchDispatchMode):
    """The operators that run, with the types and shapes of what goes in and comes out."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False
        result = func(*args, **(kwargs or {}))
        into = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if any(t.device.type == self.device for t in (*into, *out)):
            facts = [(str(t.dtype), tuple(t.shape)) for t in (*into, *out)]
            self.seen.append((str(func), facts))
        return result


@pytest.mark.gpu
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-autocast"])
def test_a_step_runs_the_operators_of_cuda(tuning: str, precision: str) -> None:
    """All of them, in their order, but for views and for clipping, which is per tensor on meta."""
    plan = tiny_plan("ppo", tuning=tuning, precision=precision, attention="eager")
    elsewhere = ("aten._foreach", "aten.lift_fresh", "aten.linalg_vector_norm", "aten.stack")
    elsewhere += ("aten.mul_", "aten._local_scalar", "aten.is_nonzero", "aten.detach")
    seen = []
    for device in ("cuda", "meta"):
        with Operators(device) as operators:
            run_step(plan, built(plan, torch.device(device)))
        seen.append([fact for fact in operators.seen if not fact[0].startswith(elsewhere)])
    assert seen[0] == seen[1]


def test_checkpointing_recomputes_in_the_types_of_the_forward() -> None:
    """Recomputing outside of the region would save tensors of other types, and torch would say."""
    plan = tiny_plan("sft", precision="bf16-mixed", checkpointing=True)
    roles = built(plan, META)
    with MasksArePadded(), Operators("meta") as operators:
        run_step(plan, roles)
    products = [facts for name, facts in operators.seen if name == "aten.mm.default"]
    assert products and all(dtype == "torch.bfloat16" for facts in products for dtype, _ in facts)
