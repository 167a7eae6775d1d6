"""Mean-pooled vectors, and what they are worth, against sentence-transformers and plain references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from tiny_models import build, word_tokenizer

from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.evaluation.passes import Passes
from pretrain.evaluation.vectors import answer_places, mean_vectors, score_retrieval, score_similarity
from tests.two_ranks import two_ranks

CPU = torch.device("cpu")
PASSES = Passes(CPU, batch_tokens=64)
SCORES = [("recall", 1), ("recall", 10), ("mrr", 10), ("ndcg", 10)]


@pytest.mark.parametrize("name", ["modernbert", "bert", "roberta", "gpt2", "llama"])
def test_vectors_are_means_over_the_tokens_of_a_text(
    name: str, directories: dict[str, Path], sentences: list[str]
) -> None:
    model = load_model(directories[name], device="cpu")
    found, cut = mean_vectors(model, sentences[:6], PASSES, window=20)
    lengths = []
    for vector, text in zip(found, sentences, strict=False):
        ids = model.tokenizer(text, truncation=True, max_length=20)["input_ids"]
        lengths.append(len(model.tokenizer(text)["input_ids"]))
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        assert np.abs(vector - states[0].mean(0).numpy()).max() < 1e-5
    assert cut == sum(length > 20 for length in lengths) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modernbert", "bert", "roberta", "gpt2", "llama"])
def test_vectors_are_those_of_sentence_transformers(
    name: str, directories: dict[str, Path], sentences: list[str]
) -> None:
    library: Any = pytest.importorskip("sentence_transformers")
    model = load_model(directories[name], device="cpu", head=False)
    assert model.kind == "vectors"
    window = min(model.max_positions or 24, 24)
    texts = [*sentences[:6], "the cat"]
    found, cut = mean_vectors(model, texts, PASSES, window=window)
    embedder = library.SentenceTransformer(str(directories[name]), device="cpu")
    pooling = type(embedder[1])(embedder[1].get_embedding_dimension(), pooling_mode="mean")  # of Llama: the last token
    embedder = library.SentenceTransformer(modules=[embedder[0], pooling], device="cpu")
    embedder.max_seq_length = window
    if embedder.tokenizer.pad_token is None:
        embedder.tokenizer.pad_token = embedder.tokenizer.eos_token
    theirs = embedder.encode(texts, batch_size=3)
    assert np.abs(found - theirs).max() / np.abs(theirs).max() < 1e-5
    assert cut == sum(len(model.tokenizer(text)["input_ids"]) > window for text in texts) > 0
    with_head, _ = mean_vectors(load_model(directories[name], device="cpu"), texts, PASSES, window=window)
    assert np.array_equal(found, with_head)


def test_an_encoder_decoder_gives_the_vectors_of_its_encoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model: Any = T5ForConditionalGeneration(config).eval()
    tokenizer = word_tokenizer()
    found, _ = mean_vectors(
        LoadedModel(model, tokenizer, "seq2seq", "", "", CPU), ["the cat sat", "a"], PASSES, window=24
    )
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    with torch.no_grad():
        expected = model.encoder(input_ids=ids).last_hidden_state[0].mean(0)
    assert np.abs(found[0] - expected.numpy()).max() < 1e-5


def test_similarity_is_the_correlation_of_cosines(directories: dict[str, Path], sentences: list[str]) -> None:
    model = load_model(directories["bert"], device="cpu", head=False)
    first, second, scores = sentences[:8], sentences[8:16], [3.0, 1.0, 4.0, 1.0, 5.0, 2.0, 2.5, 0.0]
    found = score_similarity(model, first, second, scores, PASSES, window=24)
    cosines = []
    for pair in zip(first, second, strict=True):
        one, other = mean_vectors(model, pair, PASSES, window=24)[0].astype(np.float64)
        cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert found["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-6)
    assert found["pearson"] == pytest.approx(pearsonr(cosines, scores).statistic, abs=1e-6)
    same = score_similarity(model, ["the cat"] * 3, ["a dog"] * 3, [1.0, 2.0, 3.0], PASSES, window=24)
    assert same["spearman"] is None


def test_retrieval_counts_ranks(directories: dict[str, Path], sentences: list[str]) -> None:
    model = load_model(directories["bert"], device="cpu", head=False)
    queries, candidates = sentences[:5], sentences[5:30]
    answers = [[0], [3], [5, 7], [11], [24]]
    found = score_retrieval(model, queries, candidates, answers, PASSES, window=24)
    vectors = mean_vectors(model, [*queries, *candidates], PASSES, window=24)[0].astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(-(vectors[:5] @ vectors[5:].T), axis=1)
    ranks = [[int(np.flatnonzero(order[q] == a)[0]) + 1 for a in right] for q, right in enumerate(answers)]
    assert found["recall_at_1"] == pytest.approx(np.mean([np.mean([r <= 1 for r in of]) for of in ranks]))
    assert found["recall_at_10"] == pytest.approx(np.mean([np.mean([r <= 10 for r in of]) for of in ranks]))
    assert found["mrr_at_10"] == pytest.approx(np.mean([1 / min(of) if min(of) <= 10 else 0 for of in ranks]))
    gains = [
        sum(1 / np.log2(r + 1) for r in of if r <= 10) / sum(1 / np.log2(n + 2) for n in range(len(of))) for of in ranks
    ]
    assert found["ndcg_at_10"] == pytest.approx(np.mean(gains))


@pytest.mark.slow
def test_retrieval_is_that_of_sentence_transformers(directories: dict[str, Path], sentences: list[str]) -> None:
    library: Any = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    model = load_model(directories["modernbert"], device="cpu", head=False)
    short = [" ".join(sentence.split()[:8]) for sentence in sentences]
    queries, candidates = short[:10], short[10:]
    answers = [[number, (7 * number + 3) % 20] if number % 3 else [number] for number in range(10)]
    found = score_retrieval(model, queries, candidates, answers, PASSES, window=24)
    evaluator = InformationRetrievalEvaluator(
        {str(number): query for number, query in enumerate(queries)},
        {str(number): candidate for number, candidate in enumerate(candidates)},
        {str(number): {str(one) for one in right} for number, right in enumerate(answers)},
        precision_recall_at_k=[1, 10],
        mrr_at_k=[10],
        ndcg_at_k=[10],
    )
    embedder = library.SentenceTransformer(str(directories["modernbert"]), device="cpu")
    theirs = evaluator(embedder)
    for ours, name in (
        ("recall_at_1", "cosine_recall@1"),
        ("recall_at_10", "cosine_recall@10"),
        ("mrr_at_10", "cosine_mrr@10"),
        ("ndcg_at_10", "cosine_ndcg@10"),
    ):
        assert found[ours] == pytest.approx(theirs[name], abs=1e-6), ours
    assert 0 < found["recall_at_1"] < found["recall_at_10"] <= 1


def test_a_candidate_as_near_as_the_answer_stands_before_it(directories: dict[str, Path]) -> None:
    """A model to which all texts are the same finds nothing."""
    model = load_model(directories["bert"], device="cpu", head=False)
    for parameter in model.model.embeddings.word_embeddings.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"]
    found = score_retrieval(model, words, words, [[number] for number in range(12)], PASSES, window=24)
    assert {found[f"{score}_at_{cut}"] for score, cut in SCORES} == {0.0}
    several = score_retrieval(model, words[:1], words, [[0, 1, 2]], PASSES, window=24)
    assert several["mrr_at_10"] == pytest.approx(1 / 10)  # behind the nine that answer nothing


def test_the_places_of_answers() -> None:
    """Behind all that are as near, whatever their order, but not behind each other; what is no number is nowhere."""
    near = np.array([0.9, 0.5, 0.5 + 1e-14, 0.7, 0.5])
    assert answer_places(near, [0]).tolist() == [1]
    assert answer_places(near, [1]).tolist() == [5]
    assert answer_places(near, [4, 2]).tolist() == [4, 5]
    assert answer_places(near, [1, 3]).tolist() == [2, 5]
    assert answer_places(near, [1, 2, 4]).tolist() == [3, 4, 5]
    assert answer_places(np.full(5, np.nan), [2]).tolist() == [5]
    for order in ([4, 3, 2, 1, 0], [1, 0, 3, 2, 4]):
        places = [answer_places(near[order], [order.index(one)])[0] for one in range(5)]
        assert places == [1, 5, 5, 2, 5]


def test_ndcg_is_that_of_scikit_learn_where_nothing_is_equally_near(
    directories: dict[str, Path], sentences: list[str]
) -> None:
    from sklearn.metrics import ndcg_score

    model = load_model(directories["bert"], device="cpu", head=False)
    queries, candidates = sentences[:4], sentences[4:30]
    answers = [[0], [3, 9], [5, 7, 11, 20], list(range(14))]
    found = score_retrieval(model, queries, candidates, answers, PASSES, window=24)
    vectors = mean_vectors(model, [*queries, *candidates], PASSES, window=24)[0].astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    right = np.zeros((4, len(candidates)))
    for row, numbers in enumerate(answers):
        right[row, numbers] = 1.0
    assert found["ndcg_at_10"] == pytest.approx(ndcg_score(right, vectors[:4] @ vectors[4:].T, k=10))


def test_two_processes_share_the_texts(directories: dict[str, Path], sentences: list[str]) -> None:
    tokenizers = [word_tokenizer(), word_tokenizer()]  # made here: two threads must not load at once

    def vectors(ranks: Any) -> np.ndarray:
        model = LoadedModel(build("bert"), tokenizers[ranks.rank], "mlm", "", "", CPU)
        return mean_vectors(model, sentences[:7], Passes(CPU, batch_tokens=64, ranks=ranks), window=24)[0]

    first, second = two_ranks(vectors)
    assert np.array_equal(first, second)
    alone, _ = mean_vectors(load_model(directories["bert"], device="cpu"), sentences[:7], PASSES, window=24)
    assert np.abs(first - alone).max() < 1e-5
