"""sentence-transformers on our encoders: vectors, training by contrast, and what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ecosystem_builders import SENTENCES, make_tokenizer, publish, tiny

library = pytest.importorskip("sentence_transformers")

# A stock BERT, a stock ModernBERT, and a shape that none holds: Loom's class, with its code beside it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("bert", {}),
    "ModernBertModel": ("modernbert", {"local_window": 8}),
    "LoomEncoderModel": ("modernbert", {"local_window": 8, "position_kind": "learned", "first_norm": True}),
}


def vectors(model: Any) -> torch.Tensor:
    return torch.tensor(model.encode(SENTENCES, batch_size=3))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("BertModel", marks=pytest.mark.slow),
        pytest.param("ModernBertModel"),
        pytest.param("LoomEncoderModel"),
    ],
)
def test_an_encoder_gives_vectors_and_learns_by_contrast(name: str, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    architecture, keys = CASES[name]
    tokenizer = make_tokenizer(tmp_path / "tokenizer", architecture)
    model = tiny(tokenizer, architecture, **keys)
    directory = publish(model, tmp_path / "model", tmp_path / "tokenizer")
    embedder = library.SentenceTransformer(str(directory), device="cpu")
    assert type(embedder[0].model).__name__ == name
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.model(**given).last_hidden_state
    real = given["attention_mask"][..., None].float()
    expected = (states * real).sum(dim=1) / real.sum(dim=1)
    assert float((vectors(embedder) - expected).abs().max() / expected.abs().max()) < 1e-5

    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = library.SentenceTransformerTrainer(
        model=embedder,
        args=arguments,
        train_dataset=Dataset.from_dict({"anchor": SENTENCES[:4], "positive": SENTENCES[4:]}),
        loss=MultipleNegativesRankingLoss(embedder),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    embedder.save_pretrained(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(vectors(again), vectors(embedder))
    assert (tmp_path / "saved" / "modeling_loom_encoder.py").is_file() is name.startswith("Loom")
