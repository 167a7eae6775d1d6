"""What a model costs: multiplied parameters and operations a token, from the numbers in its config alone.

Lives here: arithmetic. What must not: tensors, or torch.
"""

from .configuration_loom import LoomConfig, LoomEncoderConfig


def num_multiplied_parameters(config: LoomConfig, target_fraction: float = 1.0) -> float:
    """Parameters that take part in a matrix product per token; looked-up embeddings, norms and biases do not count.

    `target_fraction` is the share of positions that pass the language-model head: 1 for causal models, about the
    masking rate for MLM, whose head sees target positions alone. The head counts whether it is tied or not; weights
    that several layers share count once for each.

    An encoder with a generator counts both, and the generator's head: what training the detection of replaced tokens
    costs, less the drawing of replacements.

    A token of an encoder-decoder is a position of its input; `target_fraction` are the positions of its output for one
    of its input, which pass the decoder and the head. Keys and values of the decoder's attention to the input are made
    of each position of the input.
    """
    hidden = config.hidden_size
    queries = 2 * hidden * config.num_attention_heads * config.head_dim  # and what becomes of the mixed values
    keys = 2 * hidden * config.num_key_value_heads * config.head_dim  # and values
    attention = queries + keys
    matrices = 3 if config.mlp_kind == "gated" else 2
    mlp = matrices * hidden * config.intermediate_size
    head = hidden * config.vocab_size
    if config.head_transform:
        head = config.embedding_size * (hidden + config.vocab_size)
    projected = hidden * config.embedding_size if config.embedding_size != hidden else 0
    stack = config.num_hidden_layers * (attention + mlp) + projected
    if config.kind == "seq2seq":
        decoder = config.num_decoder_layers * (attention + queries + mlp) + projected
        return float(stack + config.num_decoder_layers * keys + target_fraction * (decoder + head))
    if isinstance(config, LoomEncoderConfig) and config.generator_size is not None:
        generator = num_multiplied_parameters(config.generator_config(), target_fraction)
        return float(stack + hidden * (hidden + 1) + generator)
    return stack + target_fraction * head


def flops_per_token(config: LoomConfig, sequence_length: int, target_fraction: float = 1.0) -> float:
    """Floating-point operations per token of one training step, forward and backward, for a row of `sequence_length`.

    Of an encoder-decoder, the input's row, beside an output of `target_fraction` x `sequence_length` positions; tokens
    and `target_fraction` as in `num_multiplied_parameters`. 6 x multiplied parameters + 12 x keys x width for each
    layer (PaLM, arXiv 2204.02311, appendix B): causal layers count the whole square, local layers the keys in their
    window.
    """
    width = config.num_attention_heads * config.head_dim

    def keys(num_layers: int, length: float) -> float:
        windows = [config.local_window if kind == "local" else None for kind in config.attention_kinds_of(num_layers)]
        return sum(length if window is None else min(length, window) for window in windows)

    seen = keys(config.num_hidden_layers, sequence_length)
    if config.kind == "seq2seq":
        across = config.num_decoder_layers * sequence_length
        seen += target_fraction * (keys(config.num_decoder_layers, sequence_length * target_fraction) + across)
    scores = 12 * seen * width
    if isinstance(config, LoomEncoderConfig) and config.generator_size is not None:
        small = config.generator_config()
        parameters = 6 * num_multiplied_parameters(small, target_fraction)
        scores += flops_per_token(small, sequence_length, target_fraction) - parameters
    return 6 * num_multiplied_parameters(config, target_fraction) + scores
