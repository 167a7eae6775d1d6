"""Sentence vectors: texts that belong together lie together.

What lives here: pairs and triples to a contrastive loss of sentence-transformers, mean pooling, and the directory that
sentence-transformers loads. What must not: another pooling, or another library's losses.

Without scores each row is an anchor, its positive and perhaps a negative: of all positives and negatives of the
micro-batch the anchor's own is to be the nearest (MultipleNegativesRankingLoss; Henderson et al. 2017, arXiv
1705.00652). A micro-batch of many rows therefore teaches more than several of few. With scores the cosine of a pair is
to be its score (CosineSimilarityLoss; Reimers and Gurevych 2019, arXiv 1908.10084).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from pretrain.config_task import EmbeddingTask
from pretrain.evaluation.loading import loading
from pretrain.evaluation.vectors import answer_places
from pretrain.tasks import metrics
from pretrain.tasks.base import Evaluated, Task, encoded
from pretrain.tasks.examples import Example, is_target, stacked
from pretrain.tasks.rows import Row

_CUT = 10


class Embeddings(Task):
    """Vectors of texts. Validation: of all positives, at which place is a row's own; or how cosines follow scores."""

    auto_class: ClassVar[str] = "AutoModel"
    section: EmbeddingTask

    @property
    def metric(self) -> str:
        """The mean reciprocal rank of the positives, or Spearman's correlation with the scores."""
        return "mrr" if self.section.score is None else "spearman"

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a row: its texts side by side, (texts, length)."""
        section = self.section
        if section.score is not None and section.negative is not None:
            raise ValueError("task.negative has no effect beside task.score; remove one of them")
        columns = [section.anchor, section.positive, *([] if section.negative is None else [section.negative])]
        examples = []
        for place, row in enumerate(rows):
            texts = [
                encoded(self.tokenizer, row.text(column), None, section.max_length, parted=True) for column in columns
            ]
            fill = self.padding()
            inputs = {name: stacked([text[name] for text in texts], fill.get(name, 0)) for name in texts[0]}
            label = 1.0 if section.score is None else self._score(row)
            examples.append(Example(inputs, np.array(label, dtype=np.float32), place))
        return examples

    def _score(self, row: Row) -> float:
        """The score of a row, from 0 to 1."""
        assert self.section.score is not None
        value, (low, high) = row[self.section.score], self.section.score_range
        try:
            number = (float(value) - low) / (high - low)
        except (TypeError, ValueError):
            number = float("nan")
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{row.where}: the score {value!r} is no number from {low:g} to {high:g}; see score_range")
        return number

    def call(self, forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
        """(B, texts, hidden) means of the last hidden states over the tokens of each text."""
        rows, texts, length = inputs["input_ids"].shape
        flat = {name: value.reshape(rows * texts, length) for name, value in inputs.items()}
        hidden = forward(**flat).last_hidden_state.float()  # (B * texts, L, hidden)
        mask = flat["attention_mask"][..., None].to(hidden.dtype)
        means = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return ModelOutput(vectors=means.reshape(rows, texts, -1))

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss of sentence-transformers, a mean over the rows, times their number."""
        vectors, known = outputs.vectors, is_target(labels)
        if not bool(known.any()):
            nothing: Tensor = vectors.sum() * 0.0
            return nothing
        vectors, labels = vectors[known], labels[known]
        if self.section.score is not None:
            errors: Tensor = (F.cosine_similarity(vectors[:, 0], vectors[:, 1]) - labels).pow(2)
            return errors.sum()
        losses = _library("sentence_transformers.sentence_transformer.losses")
        ranking = losses.MultipleNegativesRankingLoss(None, scale=self.section.scale)
        mean: Tensor = ranking.compute_loss_from_embeddings(list(vectors.unbind(1)), None)
        return mean * len(labels)

    def predictions(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
        """The vectors of a row's texts, each of length 1, (texts, hidden)."""
        vectors: list[list[list[float]]] = F.normalize(outputs.vectors, dim=-1).cpu().tolist()
        return vectors

    def answer_of(self, row: Row) -> float | None:
        """Its score, where there are scores; otherwise the first place is right for every row."""
        return None if self.section.score is None else self._score(row)

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """Correlations of the cosines, or ranks of the positives among all of the part."""
        vectors = np.array(predictions, dtype=np.float64)  # (N, texts, hidden)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        cosines = (vectors[:, 0] * vectors[:, 1]).sum(-1)
        if self.section.score is not None:
            truth = np.array([float(example.label) for example in examples])
            return Evaluated(metrics.regression(truth, cosines), cosines.tolist())
        texts = np.unique([rows[example.row].text(self.section.positive) for example in examples], return_inverse=True)[
            1
        ]
        places = np.empty(len(vectors), dtype=np.int64)
        for start in range(0, len(vectors), 256):
            near = vectors[start : start + 256, 0] @ vectors[:, 1].T  # (queries, N)
            for number, row in enumerate(near, start):  # the same text is no rival
                places[number] = answer_places(row, np.flatnonzero(texts == texts[number]))[0]
        scores = {
            "mrr": float(np.mean(1.0 / places)),
            "recall_at_1": float(np.mean(places == 1)),
            f"recall_at_{_CUT}": float(np.mean(places <= _CUT)),
        }
        return Evaluated(scores, places.tolist())

    def finish(self, directory: Path) -> None:
        """Make of a model's directory one that `SentenceTransformer(directory)` loads; plain transformers does too."""
        library = _library("sentence_transformers")
        modules = _library("sentence_transformers.sentence_transformer.modules")
        with loading(str(directory), "model"), tempfile.TemporaryDirectory(dir=directory.parent) as folder:
            words = modules.Transformer(str(directory), max_seq_length=self.section.max_length)
            pooling = modules.Pooling(words.get_embedding_dimension(), pooling_mode="mean")
            whole = library.SentenceTransformer(modules=[words, pooling], device="cpu")
            whole.save_pretrained(folder, create_model_card=False)
            for file in sorted(Path(folder).rglob("*")):
                target = directory / file.relative_to(folder)
                if file.is_dir():
                    target.mkdir(exist_ok=True)
                elif not target.exists():
                    target.write_bytes(file.read_bytes())


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"task.kind: embeddings needs sentence-transformers: {metrics.EXTRA}") from error
