"""Tokenizers: the algorithms, training on a bounded sample, the report.

What lives here: text in, a `tokenizers.Tokenizer` and its directory out. What must not: models, shards, run
configurations beyond the `tokenizer` section.
"""

from .algorithms import SpecialTokens, model_input_names, special_tokens_for
from .report import TokenizerReport, measure_tokenizer
from .sample import TextDocument, TextSample, draw_sample
from .train import TrainedTokenizer, bare_tokenizer, fit_tokenizer, write_tokenizer

__all__ = [
    "SpecialTokens",
    "TextDocument",
    "TextSample",
    "TokenizerReport",
    "TrainedTokenizer",
    "bare_tokenizer",
    "draw_sample",
    "fit_tokenizer",
    "measure_tokenizer",
    "model_input_names",
    "special_tokens_for",
    "write_tokenizer",
]
