"""What FSDP and DDP hold while a small model trains, by torch: python tests/fsdp_world.py.

Four ranks of torch's fake process group, of which this is the first: its collectives do nothing,
but every buffer is there. Prints JSON. `fsdp`: for each way to train, layers gathered at each kind
of moment, at most; how many tensors of a layer's input's size are alive when the first layer is
about to run again in backward; elements of the largest gradient joined of others. `ddp`: bytes of
its buckets and of gradients, whether they are apart, and whether the buckets are kept.
"""

from __future__ import annotations

import functools
import gc
import json
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

WIDTH, LAYERS, WORDS, TOKENS = 64, 6, 100, 37


class Layer(nn.Module):
    """A linear layer, frozen with an adapter or trained, and a residual."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__()
        self.world, self.number = [world], number  # a list: no submodule
        self.base = nn.Linear(WIDTH, WIDTH, bias=False)
        if world.frozen:
            self.base.weight.requires_grad_(False)
            self.a = nn.Linear(WIDTH, 4, bias=False)
            self.b = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        world = self.world[0]
        world.enter(self.number)
        y = self.base(x)
        if y.requires_grad and torch.is_grad_enabled():
            y.register_hook(lambda gradient: world.see(world.named(self.number)))
        if world.frozen:
            y = y + self.b(self.a(x))
        return x + torch.tanh(y)


class World(nn.Module):
    def __init__(self, frozen: bool, reentrant: bool | None) -> None:
        super().__init__()
        self.frozen, self.reentrant = frozen, reentrant
        self.layers_gathered: dict[str, int] = defaultdict(int)
        self.alive, self.backward = 0, False
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer(self, number) for number in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        for part in (self.table, self.head):
            part.weight.requires_grad_(not frozen)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        if self.frozen:
            x.requires_grad_(True)  # transformers' enable_input_require_grads
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        self.see("loss")
        return self.head(x).sum()

    def named(self, number: int) -> str:
        return "first layer" if number == 0 else "last layer"

    def enter(self, number: int) -> None:
        self.see(self.named(number) if self.backward else "forward")
        if self.backward and number == 0:
            self.alive = alive()

    def see(self, moment: str) -> None:
        size = sum(
            handle.flat_param._full_param_padded.untyped_storage().nbytes() // 4
            for module in FullyShardedDataParallel.fsdp_modules(self.wrapped[0])
            if (handle := module._handle) and module is not self.wrapped[0]
        )
        layers = round(size / WIDTH**2, 1)
        self.layers_gathered[moment] = max(self.layers_gathered[moment], int(layers))

    def run(self) -> dict[str, Any]:
        self.wrapped = [wrapped(self)]
        loss = self.wrapped[0](torch.zeros(1, TOKENS, dtype=torch.long))
        self.backward = True
        with Joins() as joins:
            loss.backward()
        return {
            "frozen": self.frozen,
            "reentrant": self.reentrant,
            "layers": dict(self.layers_gathered),
            "alive": self.alive,
            "joined": joins.largest,
        }


class Joins(TorchDispatchMode):
    """The largest tensor that is made of others, which are all there at that moment."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.largest = max(self.largest, out.numel())
        return out


def wrapped(world: World) -> FullyShardedDataParallel:
    """Each layer a unit, each adapter one of its own, as PEFT's fsdp_auto_wrap_policy does."""

    def unit(module: nn.Module) -> bool:
        if isinstance(module, Layer):
            return True
        return world.frozen and isinstance(module, nn.Linear) and module.weight.requires_grad

    return FullyShardedDataParallel(
        world,
        auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=unit),
        device_id=torch.device("cpu"),
        use_orig_params=True,
        backward_prefetch=BackwardPrefetch.BACKWARD_PRE,
    )


def alive() -> int:
    """Distinct tensors as large as a layer's input, gradients of leaves among them."""
    gc.collect()
    found = set()
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.numel() == TOKENS * WIDTH:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found.add(tensor.untyped_storage().data_ptr())
    return len(found)


def ddp() -> dict[str, Any]:
    """The buckets that DDP's communication hook is shown, in the third step."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)))
    steps: list[dict[int, int]] = []

    def seen(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, not text
        steps[-1][bucket.buffer().data_ptr()] = bucket.buffer().nbytes
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, seen)
    for _ in range(3):  # after the first step they are built anew
        steps.append({})
        model.zero_grad()
        model(torch.randn(3, WIDTH)).sum().backward()
    gradients = [p.grad.untyped_storage() for p in model.parameters()]
    return {
        "buckets": sum(steps[-1].values()),
        "gradients": sum(storage.nbytes() for storage in gradients),
        "apart": not {storage.data_ptr() for storage in gradients} & steps[-1].keys(),
        "kept": steps[-1] == steps[-2],
    }


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    rows = [World(frozen, re).run() for frozen in (False, True) for re in (True, False, None)]
    print(json.dumps({"fsdp": rows, "ddp": ddp()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
