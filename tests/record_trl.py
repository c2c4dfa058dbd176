"""Record what TRL's own trainers allocate: tests/data/trl_1.12.json and trl_1.16.json.

    python tests/record_trl.py       # trl 1.12, the last with PPOTrainer: PPO; 1.16: all the others

Runs every plan of tests/trl_plans.py of those methods, on a CUDA card or what stands in for one,
and puts the peaks of its last optimizer step into the file. The trainers are TRL's, unmodified; the
models are random. The committed files were recorded from the CUDA build of PyTorch, run on the host
without a card: its own operators, kernel choice and caching allocator, with nothing computed. What
then reads zeros is answered by `without_values`.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from live import LiveBytes  # noqa: E402
from trl_plans import PLANS, TINY, plan_of, tiny_plan_of  # noqa: E402

from fitcheck.bench.configs import config_from  # noqa: E402
from fitcheck.bench.precision import DTYPES  # noqa: E402
from fitcheck.plan import Plan  # noqa: E402

STEPS = 3  # optimizer states come with the first, PPO's kept scores with the second


class Peaks:
    """Peaks of memory between marks, by the name of the stretch that a mark begins."""

    def __init__(self) -> None:
        self.live = None if torch.cuda.is_available() else LiveBytes()
        self.peaks: dict[str, int] = self.live.peaks if self.live else {}
        self.now = "load"

    def mark(self, name: str) -> None:
        if self.live:
            self.live.mark(name)
        else:
            peak = torch.cuda.max_memory_allocated()
            self.peaks[self.now] = max(self.peaks.get(self.now, 0), peak)
            torch.cuda.reset_peak_memory_stats()
        self.now = name

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Marks around a function of TRL or accelerate."""
        inner = getattr(owner, function)

        def outer(*args: Any, **kwargs: Any) -> Any:
            before = self.now
            self.mark(name)
            result = inner(*args, **kwargs)
            self.mark(before)
            return result

        setattr(owner, function, outer)


def tokenizer() -> Any:
    """One of five words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "a", "b", "<unk>"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(plan: Plan, scores: bool = False, which: Any = None) -> Any:
    """A random model of the plan's shape, on the card, in the type that its weights have."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = config_from(which or plan.model)
    config.pad_token_id, config.use_cache = 0, True  # as in released configurations
    kind: Any = AutoModelForCausalLM
    if scores:
        kind, config.num_labels = AutoModelForSequenceClassification, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        made = kind.from_config(config, dtype=DTYPES[plan.weight_dtype])
    return made.to(device)


def arguments(plan: Plan) -> dict[str, Any]:
    """What every configuration of TRL is given."""
    return {
        **{"output_dir": "/tmp/trl-out", "report_to": "none", "save_strategy": "no"},
        **{"disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False},
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": (plan.minibatch or plan.batch) // plan.micro_batch,
        "bf16": plan.autocast,
        "gradient_checkpointing": plan.checkpointing,
        "max_steps": STEPS,
        "use_cpu": not torch.cuda.is_available(),
    }


def lora(plan: Plan) -> Any:
    """PEFT's configuration of the plan's adapters; None without."""
    if plan.tuning == "full":
        return None
    from peft import LoraConfig

    kind = "SEQ_CLS" if plan.method == "reward" else "CAUSAL_LM"
    return LoraConfig(r=plan.lora_rank, lora_alpha=32, target_modules="all-linear", task_type=kind)


def ids(tokens: int) -> list[int]:
    return [2] * (tokens - 1) + [1]


def sft(plan: Plan, peaks: Peaks) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": ids(plan.sequence)}] * (plan.batch * STEPS)
    args = SFTConfig(**arguments(plan), max_length=plan.sequence)
    return SFTTrainer(
        model(plan), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
        peft_config=lora(plan),
    )  # fmt: skip


def dpo(plan: Plan, peaks: Peaks) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    answer = " b" * (plan.sequence - 2)  # and the token that ends it
    row = {"prompt": "a", "chosen": answer, "rejected": answer}
    args = DPOConfig(**arguments(plan), max_length=plan.sequence)
    reference = model(plan) if plan.reference == "copy" else None
    return DPOTrainer(
        model(plan), reference, args, train_dataset=Dataset.from_list([row] * (plan.batch * STEPS)),
        processing_class=tokenizer(), peft_config=lora(plan),
    )  # fmt: skip


def reward(plan: Plan, peaks: Peaks) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    row = {"chosen_ids": ids(plan.sequence), "rejected_ids": ids(plan.sequence)}
    args = RewardConfig(**arguments(plan), max_length=plan.sequence)
    rows = Dataset.from_list([row] * (plan.batch * STEPS))
    return RewardTrainer(
        model(plan, scores=True), args, train_dataset=rows, processing_class=tokenizer(),
        peft_config=lora(plan),
    )  # fmt: skip


def grpo(plan: Plan, peaks: Peaks) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    # The reference is loaded anew from where the policy came from, which here is nowhere.
    grpo_trainer.create_model_from_path = lambda *_, **__: model(plan)
    given = arguments(plan) | {
        "steps_per_generation": plan.batch // plan.micro_batch,
        "num_generations": plan.group,
        "max_completion_length": plan.response,
        "num_iterations": plan.epochs,
        "max_steps": STEPS * plan.epochs * (plan.batch // plan.minibatch),
        "beta": 0.0 if plan.reference == "none" else 0.04,
    }
    rows = [{"prompt": "a " * (plan.prompt - 1) + "a"}] * (plan.batch * STEPS)
    trainer = GRPOTrainer(
        model(plan), lambda completions, **_: [0.0] * len(completions), GRPOConfig(**given),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), peft_config=lora(plan),
    )  # fmt: skip
    single_turn = trainer._generate_single_turn

    def whole(*args: Any, **kwargs: Any) -> Any:
        found, logprobs = single_turn(*args, **kwargs)
        return [ids(plan.response) for _ in found], logprobs  # read from the card, they are empty

    trainer._generate_single_turn = whole
    peaks.wrap(trainer, "_generate_and_score_completions", "score")
    peaks.wrap(trainer, "_generate_single_turn", "rollout")
    return trainer


def ppo(plan: Plan, peaks: Peaks) -> Any:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    minibatches = plan.batch // plan.minibatch
    args = PPOConfig(
        **arguments(plan) | {
            "bf16": True,  # both ignored
            "gradient_checkpointing": True,
            "max_steps": -1,
            "gradient_accumulation_steps": plan.batch // plan.micro_batch,
            "num_mini_batches": minibatches,
            "num_ppo_epochs": plan.epochs,
            "response_length": plan.response,
            "local_rollout_forward_batch_size": plan.score_batch,
            "total_episodes": plan.batch * STEPS,
            "num_sample_generations": 0,
        }
    )  # fmt: skip
    rows = [{"input_ids": ids(plan.prompt)} for _ in range(plan.batch * (STEPS + 2))]
    if plan.padding == "padded":
        for i, row in enumerate(rows):
            row["input_ids"][: 1 + i % 4] = [0] * (1 + i % 4)
    rows = Dataset.from_list(rows)
    peaks.wrap(ppo_trainer, "batch_generation", "rollout")
    peaks.wrap(ppo_trainer, "get_reward", "score.reward")
    inner = ppo_trainer.forward

    def forward(which: Any, *args: Any) -> Any:
        name = "update.forward" if which is trainer.model else "score.reference"
        before = peaks.now
        peaks.mark(name)
        result = inner(which, *args)
        peaks.mark("update.loss" if which is trainer.model else before)
        return result

    ppo_trainer.forward = forward
    scorers = [model(plan, True, of) for of in (plan.reward_architecture, plan.critic_architecture)]
    trainer = PPOTrainer(
        args, tokenizer(), model(plan), model(plan) if plan.reference == "copy" else None,
        scorers[0], rows, scorers[1],
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        peft_config=lora(plan), eval_dataset=rows,
    )  # fmt: skip
    return trainer


TRAINERS: dict[str, Callable[[Plan, Peaks], Any]] = {
    f.__name__: f for f in (sft, dpo, reward, grpo, ppo)
}


def record(plan: Plan) -> dict[str, int]:
    """Peaks of bytes in the last of STEPS optimizer steps (PPO and GRPO: rollouts), by stretch.

    On a card what its allocator says, on a CPU what is alive.
    """
    peaks = Peaks()
    with peaks.live or nullcontext():
        return _record(plan, peaks)


def _record(plan: Plan, peaks: Peaks) -> dict[str, int]:
    trainer = TRAINERS[plan.method](plan, peaks)
    gc.collect()
    peaks.mark("update")
    peaks.wrap(trainer.accelerator, "backward", "update.backward")
    found: list[dict[str, int]] = []
    if plan.method == "ppo":
        peaks.wrap(trainer.optimizer, "step", "update.step")
    from transformers import TrainerCallback

    class Each(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            peaks.mark(peaks.now)
            found.append(dict(peaks.peaks))
            peaks.peaks.clear()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            peaks.mark("update.step")

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            peaks.mark("update")

    trainer.add_callback(Each)
    trainer.train()
    per_rollout = len(found) // STEPS or 1
    last: dict[str, int] = {}
    for part in found[-per_rollout:]:
        for name, peak in part.items():
            last[name] = max(last.get(name, 0), peak)
    return last


class AllChosen(TorchFunctionMode):
    """Indexing by a mask that reads as zeros takes as many entries as its plan says are real.

    (A dispatch mode could not stand here: autograd adds up gradients otherwise under one.)
    """

    def __init__(self, scored: int) -> None:
        super().__init__()
        self.scored = scored  # tokens of each row

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            mask = args[1]
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.is_cuda:
                args = (args[0], self.places(mask), *args[2:])
        return func(*args, **(kwargs or {}))

    def places(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What mask.nonzero() gives: columns of one tensor."""
        count = len(mask) * (min(self.scored, mask.shape[1]) if mask.ndim > 1 else 1)
        found = torch.zeros(count, mask.ndim, dtype=torch.long, device=mask.device)
        return tuple(found.unbind(1))


@contextmanager
def on_cpu() -> Iterator[None]:
    """The fused head is given only what is scored, as on a card (and works on it in torch)."""
    from trl.trainer import utils

    utils._use_triton = lambda device: True
    yield


@contextmanager
def without_values(plan: Plan) -> Iterator[None]:
    """Where nothing is computed: loops end by length, masks choose what they would, no kernels."""
    from transformers import masking_utils
    from transformers.generation import utils

    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda ids: (found(ids), None)[1]
    limit = (plan.prompt or 0) + (plan.response or 0)
    for kind in (utils.StopCheck, utils.DeferredStopCheck):
        kind.__call__ = lambda self, unfinished, tokens, length: length >= limit
    try:
        from trl.kernels import chunked_logprob
    except ImportError:  # 1.12
        from trl.experimental.ppo import ppo_trainer

        ppo_trainer.masked_var = lambda values, mask: ((values - values.mean()) ** 2).mean()
    else:
        launch = type("Launch", (), {"__getitem__": lambda self, grid: lambda *_, **__: None})
        chunked_logprob._forward_kernel = chunked_logprob._backward_kernel = launch()
    with AllChosen(plan.response or plan.sequence):
        yield


def main() -> None:
    import trl

    plans, resolved = (PLANS, plan_of) if torch.cuda.is_available() else (TINY, tiny_plan_of)
    if "--plan" in sys.argv:
        for number in sys.argv[sys.argv.index("--plan") + 1 :]:
            record_alone(resolved(plans[int(number)]))
        return
    release = ".".join(trl.__version__.split(".")[:2])
    runs: list[dict[str, Any]] = []
    for number, knobs in enumerate(plans):
        if (knobs["method"] == "ppo") == (release == "1.12"):
            command = [sys.executable, __file__, "--plan", str(number)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks = json.loads(done.stdout.splitlines()[-1])
            runs.append({"plan": knobs, "bytes": peaks})
            write(release, runs)


def record_alone(plan: Plan) -> None:
    """Print the peaks of one plan."""
    if not torch.cuda.is_available():
        context = nullcontext() if plan.method == "ppo" else on_cpu()
    else:
        context = nullcontext() if values() else without_values(plan)
    with context:
        print(json.dumps(record(plan)))


def write(release: str, runs: list[dict[str, Any]]) -> None:
    import transformers
    import trl

    on_card = torch.cuda.is_available()
    where = "the CUDA build of PyTorch, run on a host without a card" if on_card else "a CPU"
    what = "allocated" if on_card else "alive"
    data = {
        "source": f"TRL's trainers on {where}: bytes {what} (tests/record_trl.py)",
        "versions": {"trl": trl.__version__, "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "checked": "2026-11-27",
        "runs": runs,
    }
    name = f"trl_{release}.json" if on_card else f"trl_{release}_cpu.json"
    path = Path(__file__).parent / "data" / name
    path.write_text(json.dumps(data, indent=1) + "\n")


def values() -> bool:
    """Whether this card computes."""
    return bool(torch.ones(1, device="cuda").item())


if __name__ == "__main__":
    main()
