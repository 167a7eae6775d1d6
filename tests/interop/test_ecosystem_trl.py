"""TRL's SFTTrainer on our decoders: text, chats, packed rows whose documents do not see each other, and the loss."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ecosystem_builders import SENTENCES, make_tokenizer, publish, tiny
from transformers import AutoModelForCausalLM

trl = pytest.importorskip("trl")

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}{% endfor %}"
TEXT = {"text": SENTENCES}
CHATS = {
    "messages": [
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        for first, second in pairwise(SENTENCES)
    ]
}


def make(root: Path, architecture: str = "llama", stock: bool = False, **keys: Any) -> tuple[Any, Any]:
    """A decoder, the same each time, and its tokenizer."""
    tokenizer = make_tokenizer(root / "tokenizer", architecture)
    tokenizer.chat_template = TEMPLATE
    model = tiny(tokenizer, architecture, **keys)
    if stock:
        model = AutoModelForCausalLM.from_pretrained(publish(model, root / "stock", root / "tokenizer")).eval()
    return model, tokenizer


def make_trainer(model: Any, tokenizer: Any, data: dict[str, Any], out: Path, **keys: Any) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(out),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=64,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **keys,
    )
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("data", "keys", "stock"),
    [
        pytest.param(TEXT, {}, False, id="text-loom", marks=pytest.mark.slow),
        pytest.param(CHATS, {}, False, id="chat-loom"),
        pytest.param(TEXT, {"packing": True}, False, id="packed-loom"),
        pytest.param(TEXT, {}, True, id="text-stock", marks=pytest.mark.slow),
        pytest.param(CHATS, {}, True, id="chat-stock", marks=pytest.mark.slow),
        pytest.param(TEXT, {"packing": True}, True, id="packed-stock", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_is_trained(data: dict[str, Any], keys: dict[str, Any], stock: bool, tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, stock=stock)
    found = losses(make_trainer(model, tokenizer, data, tmp_path / "out", **keys))
    assert found[-1] < 0.8 * found[0]


def test_documents_of_a_packed_row_do_not_see_each_other(tmp_path: Path) -> None:
    """What TRL packs comes without a mask and without document ids: positions that start anew say it."""
    model, tokenizer = make(tmp_path)
    trainer = make_trainer(model, tokenizer, TEXT, tmp_path / "out", packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["position_ids"].shape[1]]
    assert len(starts) > 3
    middle = slice(starts[1], starts[2])
    model.eval()
    ids = batch["input_ids"]
    scored = model(**batch, use_cache=False, fused_lm_head=True).log_probs  # what is trained on
    logits = {}
    for name, changed in (("before", slice(starts[0], starts[1])), ("after", slice(starts[2], starts[3]))):
        others = ids.clone()
        others[:, changed] = (others[:, changed] + 1) % len(tokenizer)
        for use_cache in (None, False):  # whether by the config's default or without a cache
            with torch.no_grad():
                output = model(input_ids=others, position_ids=batch["position_ids"], use_cache=use_cache)
            logits[name, use_cache] = output.logits[0, middle]
        again = model(**(batch | {"input_ids": others}), use_cache=False, fused_lm_head=True).log_probs
        targets = slice(middle.start, middle.stop - 1)
        assert torch.equal(again[0, targets], scored[0, targets])
    with torch.no_grad():
        alone = model(input_ids=ids[:, middle]).logits[0]
    for found in logits.values():
        assert torch.allclose(found, alone, atol=1e-5 * float(alone.abs().max()))


def test_a_packed_row_is_the_same_to_loom_and_to_the_stock_class(tmp_path: Path) -> None:
    loom, tokenizer = make(tmp_path)
    stock, _ = make(tmp_path, stock=True)
    ids = torch.cat([torch.tensor(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES[:3]])[None]
    positions = torch.cat([torch.arange(len(tokenizer(sentence)["input_ids"])) for sentence in SENTENCES[:3]])[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, position_ids=positions, use_cache=False).logits for model in (loom, stock))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {}),
        ("gpt2", {"logit_softcap": 2.0, "output_scale": 0.5}),  # TRL makes the logits, and finds both in the config
    ],
)
def test_the_loss_is_that_of_the_class(architecture: str, keys: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, architecture, **keys)
    trainer = make_trainer(model, tokenizer, TEXT, tmp_path / "out")
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss
        found = trainer.compute_loss(model, dict(batch))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True], ids=["loom", "stock"])
def test_a_transform_before_the_token_head_needs_a_loss_of_ones_own(stock: bool, tmp_path: Path) -> None:
    """TRL applies the output table to the last hidden state itself and knows of nothing between, of any class.

    `compute_loss_func` is handed the logits of the class: with it the loss is right.
    """
    model, tokenizer = make(tmp_path, "modernbert-decoder", stock, local_window=8)
    trainer = make_trainer(model, tokenizer, TEXT, tmp_path / "out")
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        expected = float(model(**batch).loss)
        assert float(trainer.compute_loss(model, dict(batch))) != pytest.approx(expected, rel=1e-3)

    def of_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        total = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
        )
        return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    trainer.compute_loss_func = of_logits
    with torch.no_grad():
        assert float(trainer.compute_loss(model, dict(batch))) == pytest.approx(expected, rel=1e-5)
