"""What a forward pass keeps for its backward pass, tensor by tensor, and what comes and goes beside it.

What lives here: the bytes of one micro-batch in a Loom block, its attention and the fused head with its loss. What must
not: parameters, gradients, optimizers, or how many devices share them (`memory`).

The lists below follow autograd: an operation keeps its inputs (or its result) until its backward ran. Residual sums
and norms are fp32; the results of products are in the compute type, and under autocast every product keeps a cast
copy of its input, and every weight a cast copy. T = rows x length tokens, h hidden, f intermediate, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pretrain.planning.facts import ModelFacts

WIDE = 4  # bytes of fp32
# The fused head's chunk of logits, and what the CPU kernels choose by: as in `models`, compared by a test.
CHUNK_ELEMENTS = 8 * 2**20
CACHE_ELEMENTS = 2**18
LARGEST_SQUARE = 2**25
SHORTEST_FLOAT32_ROW = 256
CAUSAL_BLOCK = 128
FUSED_ROWS = 256


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a micro-batch.

    Attributes:
        rows: of the micro-batch.
        length: token positions of a row.
        compute: bytes of the compute type: 4 for fp32, 2 for bf16 and fp16.
        device: "cuda" or "cpu": their kernels keep different things.
        eager_attention: the reference attention instead of the fused kernels.
        checkpointing: every block keeps its input alone, and runs again in the backward pass.
        target_share: of the positions, those that the head sees.
        packed: rows hold several documents, so attention takes a mask.
        memory_length: of the encoder's row that a decoder looks at.
    """

    rows: int
    length: int
    compute: int
    device: Literal["cuda", "cpu"] = "cuda"
    eager_attention: bool = False
    checkpointing: bool = False
    target_share: float = 1.0
    packed: bool = True
    memory_length: int = 0

    def of(self, stack: ModelFacts) -> Pass:
        """What passes one stack of a model: a decoder beside an encoder has rows of its own, all of them targets."""
        if not stack.crosses:
            return self
        length = stack.target_length or self.length
        return replace(self, length=length, memory_length=self.length, target_share=1.0)

    @property
    def tokens(self) -> int:
        """Token positions."""
        return self.rows * self.length

    @property
    def cast(self) -> bool:
        """Whether products run in a narrower type than parameters have."""
        return self.compute < WIDE

    @property
    def joined(self) -> bool:
        """Whether projections of one input run as one product (CPU)."""
        return self.device == "cpu" and self.tokens >= FUSED_ROWS


@dataclass(frozen=True)
class Block:
    """Bytes of one block.

    Attributes:
        kept: of activations, from the forward pass to the block's backward pass.
        weights: of copies of its weights, kept as long.
        mlp: the part of `kept` that the backward pass of the MLP frees.
        mlp_extra: the most that the backward pass of the MLP adds.
        attention_extra: the most that the backward pass of attention adds, its MLP being done.
        cached_weights: of casts that autocast holds to the end of the forward pass, whatever the graph keeps.
    """

    kept: float
    weights: float
    mlp: float
    mlp_extra: float
    attention_extra: float
    cached_weights: float


@dataclass(frozen=True)
class Head:
    """Bytes of the head and its loss: during its forward pass, and as its backward pass starts.

    `kept` are activations; `lasting` are gradients that were made in the forward pass and wait for the backward pass.
    """

    forward: float = 0.0
    backward: float = 0.0
    kept: float = 0.0
    lasting: float = 0.0


def block(facts: ModelFacts, step: Pass, layer: int) -> Block:
    """The bytes of one block of the stack."""
    tokens, compute, hidden = step.tokens, step.compute, facts.hidden_size
    stream = WIDE * tokens * hidden
    middle = compute * tokens * facts.intermediate_size
    normed = _norm(facts, step)
    has_norm = facts.first_norm or layer > 0
    attention_inputs = 1 if step.joined else 3
    mlp_inputs = 1 if step.joined or not facts.gated else 2
    # The residual sum before each branch; the norms' results are the inputs of products.
    attention = normed * has_norm + (stream if has_norm or not step.cast else 0)
    attention += attention_inputs * compute * tokens * hidden if step.cast else stream * has_norm
    mixed, scores = _attention(facts, step)
    attention += mixed
    mlp = stream + normed + (mlp_inputs * compute * tokens * hidden if step.cast else stream)
    mlp += ((4 if facts.gated else 2) - facts.relu) * middle  # its slope is known from its result
    if facts.hidden_dropout:
        attention += tokens * hidden * (1 if step.device == "cuda" else compute)
        mlp += tokens * hidden * (1 if step.device == "cuda" else compute)
    if facts.parallel:  # both branches read one sum, or one norm of it
        mlp -= stream * (2 if facts.shared_norm and not step.cast else 1)
    if facts.qk_norm:
        attention += (2 if step.cast else 1) * WIDE * tokens * (facts.query_width + facts.key_width)
    attention += _cross(facts, step)
    weights, cached = _weights(facts, step, layer)
    down = hidden * facts.intermediate_size
    slope = stream + (2 if facts.gated else 1) * middle + (WIDE + (compute if step.cast else 0)) * down
    slope += compute * tokens * hidden if step.cast else 0
    widths = 2 * facts.query_width + 2 * facts.key_width
    return Block(
        kept=attention + mlp,
        weights=weights,
        mlp=mlp,
        mlp_extra=slope + (stream if facts.post_norm else 0),
        attention_extra=2 * stream + compute * tokens * widths + scores,
        cached_weights=cached,
    )


def _cross(facts: ModelFacts, step: Pass) -> float:
    """What a decoder's look at an encoder keeps."""
    if not facts.crosses:
        return 0.0
    tokens, compute, queries, keys = step.tokens, step.compute, facts.query_width, facts.key_width
    memory = step.rows * step.memory_length
    joined = step.device == "cpu" and memory >= FUSED_ROWS
    stream = WIDE * tokens * facts.hidden_size
    kept = stream + _norm(facts, step)
    kept += compute * (tokens + (1 if joined else 2) * memory) * facts.hidden_size if step.cast else stream
    kept += compute * (2 * tokens * queries + 2 * memory * keys) + WIDE * tokens * facts.num_attention_heads
    return kept + (compute * step.rows * step.length * step.memory_length if step.packed else 0)


def _norm(facts: ModelFacts, step: Pass) -> float:
    """What a norm keeps beside its input: statistics; where it is no single kernel, its input over the root, too."""
    if not facts.rms_norm:
        return 2 * WIDE * step.tokens
    return WIDE * step.tokens * (1 + (facts.hidden_size if step.device == "cpu" else 0))


def _weights(facts: ModelFacts, step: Pass, layer: int) -> tuple[float, float]:
    """Copies of a block's weights: (kept by the graph, held by autocast's cache)."""
    if not facts.uses_first(layer):
        return 0, 0
    matrices = facts.layer_matrices[facts.block_of(layer)]
    joined = facts.hidden_size * (facts.query_width + (4 if facts.crosses else 2) * facts.key_width)
    joined += 2 * facts.hidden_size * facts.intermediate_size if facts.gated else 0
    if step.cast:
        return step.compute * matrices, step.compute * (matrices - joined if step.joined else matrices)
    return (WIDE * joined if step.joined else 0), 0


def _attention(facts: ModelFacts, step: Pass) -> tuple[float, float]:
    """(Bytes that attention keeps, queries to result; bytes of scores that its backward pass makes)."""
    tokens, compute, queries, keys = step.tokens, step.compute, facts.query_width, facts.key_width
    square = step.rows * facts.num_attention_heads * step.length**2
    output = compute * tokens * queries
    if step.eager_attention:
        wide = WIDE * square + (compute * square if step.cast else 0)
        return compute * tokens * 3 * queries + output + wide, 2 * WIDE * square
    if step.device == "cuda":
        # The memory-efficient kernel: inputs, result, log-sum-exp, and the mask as a summand, made in each layer.
        mask = compute * step.rows * step.length**2 if step.packed and not facts.position_bias else 0
        return compute * tokens * (queries + 2 * keys) + output + WIDE * tokens * facts.num_attention_heads + mask, 0
    if _own_cpu_kernel(facts, step):
        seen = _seen(facts, step) / step.length**2 * square
        widest = 2 * square if facts.encoder else 3 * min(1.0, CAUSAL_BLOCK / step.length) * square
        return compute * tokens * 3 * queries + output + compute * seen, compute * widest
    mask = compute * step.rows * step.length**2 if step.packed and not facts.position_bias else 0
    if facts.attention_dropout:  # no fused kernel on a CPU: probabilities, what is dropped, and what is left
        left = compute * tokens * 3 * queries + (2 * WIDE + compute) * square
        return left + output + mask, 2 * WIDE * square
    raw = compute * tokens * (queries + 2 * keys)
    if facts.learned_bias:  # the products one by one: scaled queries and keys, values, probabilities
        return raw + 2 * output + (2 if step.cast else 1) * compute * square, 2 * compute * square
    if facts.num_key_value_heads != facts.num_attention_heads:
        inputs = compute * tokens * 3 * queries + (0 if facts.rotary else raw * step.joined)
    elif facts.rotary:
        turned = compute * tokens * (queries + keys)
        inputs = turned + (raw if step.joined else compute * tokens * keys)
    else:
        inputs = raw
    return inputs + output + WIDE * tokens * facts.num_attention_heads + mask, 0


def _own_cpu_kernel(facts: ModelFacts, step: Pass) -> bool:
    square = step.rows * facts.num_attention_heads * step.length**2
    if facts.attention_dropout or facts.learned_bias or square > LARGEST_SQUARE or step.length < 16:
        return False
    return step.cast or (not facts.encoder and step.length >= SHORTEST_FLOAT32_ROW)


def _seen(facts: ModelFacts, step: Pass) -> int:
    """Scores of one head that the CPU kernel makes: the whole square, or blocks of rows below the diagonal."""
    if facts.encoder:
        return step.length**2
    starts = range(0, step.length, CAUSAL_BLOCK)
    stops = [min(start + CAUSAL_BLOCK, step.length) for start in starts]
    return sum((stop - start) * stop for start, stop in zip(starts, stops, strict=True))


def masks(facts: ModelFacts, step: Pass) -> float:
    """Bytes of the attention masks, one for each kind of layer, while the stack runs."""
    if not step.packed:
        return 0
    kinds = len(set(facts.local_layers))
    square = step.rows * step.length**2
    additive = step.compute if (step.device == "cpu" and _own_cpu_kernel(facts, step)) or step.eager_attention else 0
    return kinds * square * (1 + additive)


def outside_stack(facts: ModelFacts, step: Pass) -> float:
    """Bytes kept by the embeddings' norm and projection, the final norm, rotary tables and biases by position."""
    stream, narrow = WIDE * step.tokens * facts.hidden_size, WIDE * step.tokens * facts.embedding_size
    kept = 0.0
    if facts.embedding_norm:
        kept += narrow + _norm(facts, step)
        kept += narrow if not step.cast and not facts.first_norm else 0  # the first block's product takes its result
    if facts.embedding_size != facts.hidden_size:
        kept += step.compute * step.tokens * facts.embedding_size
    if not facts.post_norm:
        kept += stream + _norm(facts, step)
    if facts.rotary:
        kept += len(set(facts.local_layers)) * WIDE * step.tokens * facts.head_dim
    if facts.position_bias:
        kept += _position_bias(facts, step)
    return kept + (stream if facts.headless else 0)  # what the decoder looks at


def _position_bias(facts: ModelFacts, step: Pass) -> float:
    """The bias of each head, added to what the mask closes, once for all layers of a kind."""
    kinds, square = len(set(facts.local_layers)), facts.num_attention_heads * step.length**2
    return kinds * (WIDE + step.compute * (step.rows if step.packed else 1)) * square


def head(facts: ModelFacts, step: Pass) -> Head:
    """The head with its loss.

    Of tokens in chunks; gradients are made in the forward pass and scaled in the backward pass (`models.losses`).
    """
    if facts.headless:
        return Head()
    if facts.detects:
        return _detection(facts, step)
    compute, hidden, width, vocabulary = step.compute, facts.hidden_size, facts.head_width, facts.vocab_size
    targets = step.target_share * step.tokens
    last_hidden = WIDE * step.tokens * hidden
    kept = WIDE * targets * hidden + 8 * targets if facts.encoder else 0.0  # index
    if facts.head_transform:  # dense, activation, norm
        kept += compute * targets * (hidden + 3 * width) if step.cast else 3 * WIDE * targets * width
    rows = min(targets, max(64, CHUNK_ELEMENTS // vocabulary))
    chunks = 2 if targets > rows else 1
    logits = compute * rows * vocabulary
    block_rows = min(rows, max(8, CACHE_ELEMENTS // vocabulary)) if step.device == "cpu" else rows
    # fp32 scores (where logits are narrower) and probabilities; those of the block before live until they are replaced
    wide = block_rows * vocabulary * WIDE * ((1 + step.cast) + (block_rows < rows))
    product = compute * facts.head_size
    gradients = compute * targets * width + WIDE * facts.head_size
    matrix = compute * facts.head_size if step.cast else 0
    part = compute * rows * width if step.cast else 0
    running = max(chunks * logits + wide, logits + product) + matrix + part
    scaled = WIDE * facts.head_size + WIDE * targets * width + (compute * targets * width if step.cast else 0)
    return Head(last_hidden + gradients + running, gradients + scaled, kept, gradients)


def _detection(facts: ModelFacts, step: Pass) -> Head:
    """A discriminator's head: dense, activation and a number for each token."""
    stream = step.tokens * facts.hidden_size
    kept = 3.0 * step.compute * stream  # what comes in, and the results of both
    last_hidden = WIDE * stream if step.cast else 0
    return Head(last_hidden, 2.0 * step.compute * stream, kept)
