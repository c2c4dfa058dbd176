"""What running a model costs beside its weights: forward passes, saved activations, backward, loss.

Each figure is played on a Tape (decoder.py is the model's code) for one layer of each kind, then
added up over the layers. All results are bytes; they are cached, since few knobs change them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fitcheck import coefficients
from fitcheck.decoder import Decoder
from fitcheck.kernels import embedding_backward
from fitcheck.model import Model
from fitcheck.ops import Setting
from fitcheck.tape import Tape
from fitcheck.walk import Stage, Walked, traced_layers


class Shape(NamedTuple):
    """`rows` sequences of `length` tokens; `scored` of them in each row reach the loss."""

    rows: int
    length: int
    scored: int = 0
    past: int = 0  # tokens already in the KV cache

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class Cost(NamedTuple):
    """One piece (a layer, the head with its loss), its input included in every peak.

    kept: saved for backward. cached: autocast's casts of its weights. forward: peak without
    gradients; training: with them. backward: peak from the end of forward on, the incoming gradient
    and new weight gradients included (with `replay`, from the start of running the piece again).
    gradients: of its weights.
    """

    kept: int
    cached: int
    forward: int
    training: int
    backward: int
    gradients: int


@lru_cache(maxsize=8192)
def forward_peak(model: Model, setting: Setting, shape: Shape, piece: str) -> tuple[int, int]:
    """(peak, casts of weights that stay until autocast's region ends) without gradients."""
    if piece.startswith("kind"):
        traced = coefficients.layer(model, setting, shape.rows, shape.length, int(piece[4:]))
        return traced.forward, traced.cached
    tape = Tape(grad=False)
    block = Decoder(tape, model, setting, shape.rows, shape.length, shape.scored, shape.past)
    x = tape.new(shape.tokens * model.hidden_size * setting.stream, setting.stream)
    y = getattr(block, piece)(x)
    del x, y
    return tape.peak, sum(cast.bytes for cast in tape.region)


@lru_cache(maxsize=8192)
def cache_widths(model: Model, setting: Setting) -> tuple[int, int]:
    """Bytes of an element of K and of V in a KV cache that this setting fills.

    Keys that fp32 angles have rotated are fp32, values come from a product in 16 bits. What the
    second layer keeps stands for all: the first one may be given another type than the others.
    """
    if coefficients.is_traced(model):
        return setting.compute, setting.compute
    tape = Tape(grad=False)
    block = Decoder(tape, model, setting, 1, 1)
    x = tape.new(model.hidden_size * setting.stream, setting.stream)
    block.layer(block.layer(x))
    return block.cache_widths


@lru_cache(maxsize=8192)
def training_cost(model: Model, setting: Setting, shape: Shape, piece: str, first: bool = False,
                  accumulate: bool = False, replay: bool = False) -> Cost:  # fmt: skip
    """Play a piece forward and back. first: nothing below it needs a gradient."""
    forward, cached = forward_peak(model, setting, shape, piece)
    tape = Tape(grad=True, accumulate=accumulate)
    block = Decoder(tape, model, setting, shape.rows, shape.length, shape.scored, shape.past)
    size = setting.stream
    x = tape.new(shape.tokens * model.hidden_size * size, size, grad=not first)
    waiting = x.bytes if replay else 0  # the incoming gradient, while the layer runs again
    tape.live += waiting
    y = getattr(block, piece)(x)
    end, training = y.edge, tape.peak
    tape.region.clear()
    if not replay:
        del x  # with checkpointing the layer's input outlives its backward
    del y
    tape.live -= waiting
    kept = tape.live
    if not replay:
        tape.peak = tape.live
    tape.backward(end)
    return Cost(kept, cached, forward, training, tape.peak, sum(g.bytes for g in tape.grads))


Groups = tuple[tuple[int, Setting, str], ...]


def groups(model: Model, setting: Setting, length: int) -> Groups:
    """Layers that run alike: (count, setting, piece). A window within the text needs a mask."""
    if coefficients.is_traced(model):
        order = coefficients.order(model)
        return tuple((order.count(kind), setting, f"kind{kind}") for kind in sorted(set(order)))
    windowed = sum(
        g.layers for g in model.kv_cache_groups or () if g.window is not None and g.window <= length
    )
    if setting.masked or windowed == 0 or setting.kernel == setting.masked_kernel == "flash":
        kinds = [(model.num_layers, setting)]
    else:
        masked = setting._replace(masked=True, kernel=setting.masked_kernel)
        kinds = [(windowed, masked), (model.num_layers - windowed, setting)]
    dense = (model.num_layers - model.moe.moe_layers) if model.moe else 0
    found = []
    for count, how in kinds:  # dense layers come first, where a mixture has any
        found += [
            (min(dense, count), how, "dense_layer"),
            (count - min(dense, count), how, "layer"),
        ]
        dense -= min(dense, count)
    return tuple(kind for kind in found if kind[0])


@lru_cache(maxsize=8192)
def inference_peak(model: Model, setting: Setting, shape: Shape, head: str) -> tuple[int, int, int]:
    """In a pass without gradients: casts of the layers' weights that stay, and beside them the
    largest working memory of the layers, of the head."""
    casts = largest = 0
    later = _streaming(model, setting)
    for count, kind, piece in groups(model, later, shape.length):
        peak, cached = forward_peak(model, kind, shape, piece)
        largest = max(largest, peak - cached)
        casts += count * cached
    # The model's own code keeps the embedded tokens to its end (inputs_embeds).
    embedded = shape.tokens * model.embedding_width * setting.stream if model.num_layers > 1 else 0
    head_peak, _ = forward_peak(model, later, shape, head)
    return casts, largest + embedded, head_peak


@lru_cache(maxsize=8192)
def _streaming(model: Model, setting: Setting) -> Setting:
    """The setting of all layers but the first, and of the head: some layers hand fp32 on."""
    if coefficients.is_traced(model):
        return setting._replace(stream=coefficients.stream(model, setting))
    tape = Tape(grad=False)
    block = Decoder(tape, model, setting, 1, 1)
    x = tape.new(model.hidden_size * setting.stream, setting.stream)
    return setting._replace(stream=block.layer(x).size)


class Layers(NamedTuple):
    """All layers of an update together: what they keep, and peaks above that."""

    kept: int  # saved for backward, or one input a layer with checkpointing
    casts: int  # autocast's casts that only the region holds
    running: int  # of the last layer's forward
    replayed: int  # of the last layer's backward, the first to run
    own: int  # what the first layer keeps, the last one left
    first: int  # peak of its backward, its gradients included
    first_gradients: int
    gradients: int  # of all layers


def _checkpointed(costs: list[tuple[int, Cost]], hidden: int, reentrant: bool) -> Layers:
    """Reentrant checkpointing keeps the output that it computed again until backward is through."""
    again = hidden if reentrant else 0
    below = costs[0][1]
    return Layers(
        kept=sum(count for count, _ in costs) * hidden,
        casts=sum(count * cost.cached for count, cost in costs),
        running=max(cost.forward - cost.cached for _, cost in costs) - hidden,
        replayed=max(cost.backward for _, cost in costs) - hidden + again,
        own=hidden,
        first=below.backward + again,
        first_gradients=below.gradients,
        gradients=sum(count * cost.gradients for count, cost in costs),
    )


def _saved(costs: list[tuple[int, Cost]], below: Cost) -> Layers:
    """Without checkpointing; `below` is the first layer, which may keep less than its kind."""
    return Layers(
        kept=sum(count * cost.kept for count, cost in costs) + below.kept - costs[0][1].kept,
        casts=0,  # backward holds them
        running=max(cost.training - cost.kept for _, cost in costs),
        replayed=max(cost.backward - cost.kept for _, cost in costs),
        own=below.kept,
        first=below.backward,
        first_gradients=below.gradients,
        gradients=sum(count * cost.gradients for count, cost in costs),
    )


@lru_cache(maxsize=8192)
def update_stages(
    model: Model,
    setting: Setting,
    shape: Shape,
    head: str,
    checkpointing: bool,
    accumulate: bool,
    reentrant: bool = False,
) -> tuple[Stage, ...]:
    """The moments of one forward and backward that can be the largest, in order."""
    setting = _streaming(model, setting)
    ends = training_cost(model, setting, shape, head, False, accumulate)
    tied = _tied_gradient(model, setting, head)
    waiting = tied if accumulate else ends.gradients
    if coefficients.is_traced(model):
        walked = traced_layers(
            *(model, setting, shape.rows, shape.length, checkpointing, accumulate, waiting)
        )
    else:
        walked = _played_layers(
            model, setting, shape, checkpointing, accumulate, waiting, reentrant
        )
    kept, casts, gradients = walked.kept, walked.casts, waiting + walked.gradients
    stages = [walked.forward]
    if head not in ("chunked_loss", "fused_loss"):  # the model's forward ends in logits or scores
        piece = "score" if head == "score" else "all_logits"
        made = training_cost(model, setting, shape, piece).training
        stages.append(Stage("forward", "logits", kept, casts, made, 0))
    loss = ends.kept if head == "score" else ends.training  # of scores, the loss is a few numbers
    stages += [
        Stage("loss", "logits", kept, casts, loss, 0),
        Stage("backward", "logits", kept, 0, ends.backward - waiting, waiting),
        *walked.backward,
    ]
    if setting.trains:
        rows, width = model.vocab_size, model.embedding_width
        # In plain types the head's gradient is a transposed view: the sum is then a third tensor.
        third = tied if setting.weight == setting.compute else 0
        working = shape.tokens * model.hidden_size * setting.stream
        working += rows * width * setting.weight + third
        working += embedding_backward(shape.tokens, width, rows)
        stages.append(Stage("backward", "embedding", 0, 0, working, gradients))
    return tuple(stages)


def _played_layers(
    model: Model, setting: Setting, shape: Shape, checkpointing: bool, accumulate: bool,
    waiting: int, reentrant: bool,
) -> Walked:  # fmt: skip
    """Layers on a tape: those of the same kind lie together."""
    kinds = groups(model, setting, shape.length)
    costs = [
        (count, training_cost(model, kind, shape, piece, False, accumulate, checkpointing))
        for count, kind, piece in kinds
    ]
    if checkpointing:
        hidden = shape.tokens * model.hidden_size * setting.stream
        layers = _checkpointed(costs, hidden, reentrant)
    else:  # nothing below a frozen model's first layer needs a gradient
        _, kind, piece = kinds[0]
        first = training_cost(model, kind, shape, piece, not setting.trains, accumulate, False)
        layers = _saved(costs, first)
    kept, casts = layers.kept, layers.casts
    others = waiting + layers.gradients - layers.first_gradients
    return Walked(
        kept,
        casts,
        Stage("forward", "last layer", kept, casts, layers.running, 0),
        (
            Stage("backward", "last layer", kept, 0, layers.replayed, waiting),
            Stage("backward", "first layer", layers.own, 0, layers.first - layers.own, others),
        ),
        layers.gradients,
    )


def _tied_gradient(model: Model, setting: Setting, head: str) -> int:
    """A tied head's gradient waits for the embedding's: autograd adds them, then accumulates."""
    if not setting.trains or not model.tie_word_embeddings or head == "score":
        return 0
    return int(model.vocab_size * model.embedding_width * setting.weight)


def explain(model: Model, setting: Setting, shape: Shape, piece: str, until: str) -> str:
    """The largest tensors at a piece's peak, for people. until: no-grad, forward or backward."""
    if coefficients.is_traced(model) and piece == "layer":
        return f"{shape.rows} x {shape.length} tokens, as traced: catalog/coefficients/"
    grad = until != "no-grad"
    tape = Tape(grad=grad, explain=True)
    block = Decoder(tape, model, setting, shape.rows, shape.length, shape.scored, shape.past)
    size = setting.stream
    x = tape.new(shape.tokens * model.hidden_size * size, size, grad=grad, name="input")
    end = getattr(block, piece)(x).edge
    del x
    if until == "backward":
        tape.region.clear()
        tape.peak = tape.live
        tape.backward(end)
    sums: dict[str, int] = {}
    for name, own in tape.at_peak:
        sums[name] = sums.get(name, 0) + own
    largest = sorted(sums.items(), key=lambda item: -item[1])[:8]
    text = " + ".join(f"{name} {own / 2**20:,.1f}" for name, own in largest if own)
    return f"{shape.rows} x {shape.length} tokens, MiB: {text}"
