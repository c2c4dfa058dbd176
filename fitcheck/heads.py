"""What comes before and after the decoder layers: embedding, final norm, lm_head, and the losses.

The losses are those of fitcheck/bench/steps: transformers' ForCausalLMLoss for SFT,
log-probabilities of the response for PPO, GRPO and DPO, a score head for reward models and critics.
"""

from __future__ import annotations

from fitcheck.norms import Norms
from fitcheck.tape import Buffer, Tape

CHUNK = 256  # tokens of one chunk of `loss=chunked` (TRL's chunked_nll)
TILE = (4096, 32768)  # tokens x vocabulary of one tile of `loss=fused` (TRL 1.16 chunked_logprob)


class Heads(Norms):
    """Pieces that a Tape plays besides the layers; x is the last layer's output."""

    def logits(self, normed: Buffer, tokens: int) -> Buffer:
        """lm_head over `tokens` positions, scaled or softly capped where the model says so."""
        after = getattr(self, self.flow.logits) if self.flow.logits else None
        return after(self.head(normed, tokens)) if after else self.head(normed, tokens)

    def head(self, normed: Buffer, tokens: int) -> Buffer:
        m, s = self.model, self.setting
        width, bias = m.embedding_width, bool(m.lm_head_bias)
        return self.matmul(
            "lm_head", normed, width, m.vocab_size, tokens, s.weight, s.trains, bias=bias
        )

    def softcapped(self, logits: Buffer) -> Buffer:
        """gemma2: tanh(logits / cap) * cap."""
        logits = self.scale(logits)
        logits = self.keeping_output("tanh", logits)
        return self.scale(logits)

    def final(self, x: Buffer) -> Buffer:
        """The last norm, or OPT-350m's projection in its place."""
        m = self.model
        if m.embedding_width == m.hidden_size:
            return self.norm(x)
        return self.linear("", "project_out", x, m.hidden_size, m.embedding_width)

    def cross_entropy(self, logits: Buffer, positions: int) -> Buffer:
        """F.cross_entropy of fp32 logits: keeps the log-softmax; backward makes it twice more."""
        log_softmax = self.keeping_output("log_softmax", logits)
        del logits
        return self.tape.op("nll", [log_softmax], 4 * positions, 4, saved=[log_softmax])

    def all_logits(self, x: Buffer) -> Buffer:
        """The model's own forward ends here: logits of every position, the normed states beside."""
        normed = self.final(x)
        del x
        return self.logits(normed, self.tokens)

    def lm_loss(self, x: Buffer) -> Buffer:
        """transformers' ForCausalLMLoss over every position."""
        normed = self.final(x)
        del x
        logits = self.logits(normed, self.tokens)
        del normed
        wide = self.cast(logits, 4)
        return self.cross_entropy(wide, self.tokens)  # `logits` stays until the loss is there

    def shifted_lm_loss(self, x: Buffer) -> Buffer:
        """The same in transformers up to 4.48, which shifted the fp32 logits into a copy."""
        normed = self.final(x)
        del x
        logits = self.logits(normed, self.tokens)
        del normed
        # gpt_bigcode had a loss of its own, which left the logits in 16 bits
        wide = logits if self.model.model_type == "gpt_bigcode" else self.cast(logits, 4)
        shifted = self.tape.op("shift", [wide], wide.bytes, wide.size)
        return self.cross_entropy(shifted, self.tokens)  # logits and wide stay meanwhile

    def log_probs(self, x: Buffer) -> Buffer:
        """Log-probabilities of the scored positions: all logits, then a slice of them."""
        m, positions = self.model, self.rows * self.scored
        normed = self.final(x)
        del x
        logits = self.logits(normed, self.tokens)
        del normed
        part = self.tape.view(logits, positions * m.vocab_size * logits.size)
        del logits
        wide = self.cast(part, 4) if part.size != 4 else self.flat(part)
        del part
        return self.cross_entropy(wide, positions)

    def flat(self, part: Buffer) -> Buffer:
        """Slices of several fp32 rows are copied to be flattened; of one row they are a view."""
        return part if self.rows == 1 else self.tape.op("reshape", [part], part.bytes, 4)

    def chunk(self, x: Buffer) -> Buffer:
        """Logits and loss of one chunk of hidden states."""
        logits = self.logits(x, self.tokens)
        wide = self.cast(logits, 4)
        del logits
        return self.cross_entropy(wide, self.tokens)

    def chunked_loss(self, x: Buffer) -> Buffer:
        """Head and loss of CHUNK tokens at a time, each made again in backward (checkpoint)."""
        m, s, tape = self.model, self.setting, self.tape
        flat = self.scored_states(x)
        del x
        table = m.vocab_size * m.hidden_size
        if s.autocast and s.weight != s.compute and s.trains:
            tape.region.append(Buffer(tape, table * s.compute, s.compute, None, "lm_head cast"))
        part = Tape(grad=tape.grad, accumulate=True)
        one = type(self)(
            part, m, s, 1, min(CHUNK, max(1, flat.bytes // flat.size // m.hidden_size))
        )
        y = one.chunk(part.new(one.tokens * m.hidden_size * flat.size, flat.size, grad=True))
        forward, end = part.peak - sum(cast.bytes for cast in part.region), y.edge
        del y
        part.region.clear()
        part.backward(end)
        return tape.op(
            "chunked loss", [flat], 4 * (flat.bytes // flat.size // m.hidden_size), 4, saved=[flat],
            during=forward, temporary=part.peak + flat.bytes,  # chunks' gradients, then joined
            weight=table * s.weight if s.trains else 0,
        )  # fmt: skip

    def fused_loss(self, x: Buffer) -> Buffer:
        """Tiles of logits, never whole; gradients are summed in fp32 (bench/steps/fused.py)."""
        m, s = self.model, self.setting
        flat = self.picked_states(x) if s.kernel_head else self.scored_states(x)
        del x
        tokens, table = flat.bytes // flat.size // m.hidden_size, m.vocab_size * m.hidden_size
        rows, words = min(tokens, TILE[0]), min(m.vocab_size, TILE[1])
        if s.kernel_head:  # one kernel on a tile of the full width
            tile = rows * TILE[1] * s.compute
        else:
            tile = rows * words * s.compute + 3 * 4 * 64 * words  # three fp32 blocks of 64 rows
        tile += rows * m.hidden_size * s.compute if flat.size != s.compute else 0
        tile += words * m.hidden_size * s.compute if s.weight != s.compute else 0
        sums = 4 * tokens * m.hidden_size if flat.size != 4 else 0
        sums += 4 * table if s.trains and s.weight != 4 else 0
        return self.tape.op(
            "fused loss", [flat], 4 * tokens, 4, saved=[flat], during=tile + 8 * tokens,
            temporary=tile + sums, weight=table * s.weight if s.trains else 0,
        )  # fmt: skip

    def picked_states(self, x: Buffer) -> Buffer:
        """The same, picked by a mask of labels: a copy (TRL's add_fused_lm_head)."""
        m, positions = self.model, self.rows * self.scored
        normed = self.final(x)
        del x
        part = self.tape.view(normed, (self.tokens - self.rows) * m.hidden_size * normed.size)
        return self.tape.op("index", [part], positions * m.hidden_size * normed.size, normed.size)

    def scored_states(self, x: Buffer) -> Buffer:
        """Hidden states of the scored positions, as one list of rows."""
        m, positions = self.model, self.rows * self.scored
        normed = self.final(x)
        del x
        part = self.tape.view(normed, positions * m.hidden_size * normed.size)
        if self.rows == 1 or positions == self.tokens:
            return part
        return self.tape.op("reshape", [part], part.bytes, part.size)

    def last_logits(self, x: Buffer) -> Buffer:
        """Generation: logits of the last position only, in fp32 to sample from."""
        normed = self.final(x)
        logits = self.logits(normed, self.rows)
        wide = self.cast(logits, 4)
        return self.tape.op("softmax", [wide], wide.bytes, 4, during=wide.bytes)

    def score(self, x: Buffer) -> Buffer:
        """A reward model's or critic's head: one number a position."""
        s = self.setting
        normed = self.final(x)
        weight = s.adapter or s.weight
        return self.matmul(
            "score", normed, self.model.embedding_width, 1, self.tokens, weight, s.head_trains
        )
