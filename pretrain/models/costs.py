"""What a model costs: multiplied parameters and operations a token, from the numbers in its config alone.

Lives here: arithmetic. What must not: tensors, or torch.
"""

from .configuration_loom import LoomConfig


def num_multiplied_parameters(config: LoomConfig, target_fraction: float = 1.0) -> float:
    """Parameters that take part in a matrix product per token; looked-up embeddings, norms and biases do not count.

    `target_fraction` is the share of positions that pass the language-model head: 1 for causal models, about the
    masking rate for MLM, whose head sees target positions alone. The head counts whether it is tied or not; weights
    that several layers share count once for each. An encoder-decoder counts a position of its input, and of its
    output `target_fraction` of one.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * hidden * heads + 2 * hidden * config.num_key_value_heads * config.head_dim
    matrices = 3 if config.mlp_kind == "gated" else 2
    mlp = matrices * hidden * config.intermediate_size
    head = hidden * config.vocab_size
    if config.head_transform:
        head = config.embedding_size * (hidden + config.vocab_size)
    projected = hidden * config.embedding_size if config.embedding_size != hidden else 0
    stack = config.num_hidden_layers * (attention + mlp) + projected
    if config.kind == "seq2seq":
        decoder: int = config.num_decoder_layers * (2 * attention + mlp) + projected
        return stack + target_fraction * (decoder + head)
    return stack + target_fraction * head


def flops_per_token(config: LoomConfig, sequence_length: int, target_fraction: float = 1.0) -> float:
    """Floating-point operations per token of one training step, forward and backward, for a row of `sequence_length`.

    6 x multiplied parameters + 12 x keys x width for each layer (PaLM, arXiv 2204.02311, appendix B): causal layers
    count the whole square, local layers the keys in their window.
    """
    width = config.num_attention_heads * config.head_dim

    def keys(num_layers: int, length: float) -> float:
        windows = [config.local_window if kind == "local" else None for kind in config.attention_kinds_of(num_layers)]
        return sum(length if window is None else min(length, window) for window in windows)

    seen = keys(config.num_hidden_layers, sequence_length)
    if config.kind == "seq2seq":
        across = config.num_decoder_layers * sequence_length
        seen += target_fraction * (keys(config.num_decoder_layers, sequence_length * target_fraction) + across)
    return 6 * num_multiplied_parameters(config, target_fraction) + 12 * seen * width
