"""Task heads: what each family puts before its labels, losses written out, pairs of sentences, Auto classes, pipelines.

Formulas are in float64 on hidden states of the stack, which has its own tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_page import AGAIN, written
from head_cases import (
    DECODER_FAMILIES,
    DECODER_TASKS,
    ENCODER_FAMILIES,
    ENCODER_TASKS,
    head_batch,
    head_model,
    linear,
    logits_error,
    logits_of,
    written_loss,
)
from loom_builders import documents, relative, tiny_config, tokens
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.loss.loss_utils import ForQuestionAnsweringLoss, ForSequenceClassificationLoss
from transformers.utils import logging

from pretrain.models import model_class, model_from_config, register_hub_code

HEADS = [
    *((family, task) for family in ("bert", "modernbert", "electra") for task in ("classification", "multiple_choice")),
    *((family, task) for family in ("bert", "modernbert") for task in ("token_classification", "question_answering")),
    *(("llama", task) for task in ("classification", "token_classification", "question_answering")),
    ("modernbert-decoder", "classification"),
    ("bert", "sentence_pretraining"),
]


@pytest.mark.parametrize("task", ENCODER_TASKS)
@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_each_family_scores_as_it_was_published(family: str, task: str) -> None:
    """Dense layer and tanh or gelu for rows, nothing for tokens; ModernBERT's transform for both; EuroBERT's mean."""
    error = logits_error(family, task)
    assert error < 1e-12
    assert error <= written("Heads", f"encoder, {task}", "logits"), AGAIN
    model = head_model(family, task)
    of_rows = task in ("classification", "multiple_choice")
    outside = {name.split(".")[0] for name, _ in model.named_parameters()} - {"model"}
    before = "head" if family == "modernbert" else "pooler" if of_rows else ""
    assert outside == {"qa_outputs" if task == "question_answering" else "classifier", before} - {""}


@pytest.mark.parametrize("task", DECODER_TASKS)
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_decoder_scores_each_token_or_the_last(family: str, task: str) -> None:
    """Through a transform where the family has one."""
    error = logits_error(family, task)
    assert error < 1e-12
    assert error <= written("Heads", f"decoder, {task}", "logits"), AGAIN


@pytest.mark.parametrize(("pooling", "left"), [("cls", True), ("mean", True), ("mean", False), ("late", True)])
def test_padding_on_either_side_is_not_pooled(pooling: str, left: bool) -> None:
    model = head_model("eurobert", "classification", classifier_pooling=pooling)
    ids = tokens(1, 6)
    rest, zeros = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    sides = (rest, ids) if left else (ids, rest)
    mask = torch.cat((zeros, torch.ones_like(ids)) if left else (torch.ones_like(ids), zeros), dim=1)
    with torch.no_grad():
        padded = model(input_ids=torch.cat(sides, dim=1), attention_mask=mask).logits
        assert relative(padded, model(input_ids=ids).logits) < 1e-9


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "task"), [head for head in HEADS if head[1] != "sentence_pretraining"])
def test_losses_are_sums_over_the_given_items(architecture: str, task: str) -> None:
    model, batch = head_model(architecture, task), head_batch(task)
    output = model(**batch)
    total, count = written_loss(task, logits_of(output), batch)
    assert output.loss.item() == pytest.approx(total.item() / count, rel=1e-12)
    parts = [
        model(**{name: value[rows] for name, value in batch.items()}, num_items_in_batch=torch.tensor(count)).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(output.loss.item(), rel=1e-12)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0, 0.0])),
        ("regression", 3, torch.randn(4, 3, generator=torch.Generator().manual_seed(0))),
        ("single_label_classification", 3, torch.tensor([0, 2, 1, 1])),
        ("multi_label_classification", 3, torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
    ],
)
def test_problem_types_are_those_of_transformers(
    architecture: str, problem: str, num_labels: int, labels: Tensor
) -> None:
    """Found from the labels where they are not ambiguous, the same mean, and a sum over the numbers of the labels."""
    model, batch = head_model(architecture, "classification", num_labels=num_labels), head_batch("classification")
    del batch["labels"]
    if problem == "regression" and num_labels > 1:
        model.config.problem_type = problem
    output = model(**batch, labels=labels)
    assert model.config.problem_type == problem
    labels = labels.double() if labels.is_floating_point() else labels
    wanted = ForSequenceClassificationLoss(labels, output.logits, model.config)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    parts = [
        model(
            **{name: value[rows] for name, value in batch.items()},
            labels=labels[rows],
            num_items_in_batch=labels.numel(),
        ).loss.item()
        for rows in (slice(0, 3), slice(3, 4))
    ]
    assert sum(parts) == pytest.approx(output.loss.item(), rel=1e-9)


def test_answers_beyond_the_row_count_nothing() -> None:
    model, batch = head_model("bert", "question_answering"), head_batch("question_answering")
    batch |= {"start_positions": torch.tensor([[2], [50], [-3], [1]]), "end_positions": torch.tensor([4, 9, 1, 2])}
    output = model(**batch)
    wanted = ForQuestionAnsweringLoss(
        output.start_logits, output.end_logits, batch["start_positions"], batch["end_positions"]
    )
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    batch |= {"start_positions": torch.full((4,), 99), "end_positions": torch.full((4,), 99)}
    assert model(**batch).loss.item() == 0.0


@pytest.mark.parametrize(("architecture", "task"), HEADS)
def test_no_label_at_all_is_a_loss_of_zero_with_gradients(architecture: str, task: str) -> None:
    model, batch = head_model(architecture, task).train(), head_batch(task)
    for name in batch:
        if "label" in name:
            batch[name].fill_(-100)
        elif "positions" in name:
            batch[name].fill_(1000)
    model.config.problem_type = "single_label_classification"
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("architecture", "task"), HEADS)
def test_recomputed_layers_and_keyed_dropout_give_equal_gradients(architecture: str, task: str) -> None:
    dropouts = {"classifier_dropout": 0.4, "hidden_dropout": 0.3, "embedding_dropout": 0.2}
    model, batch = head_model(architecture, task, **dropouts).train(), head_batch(task)
    keys, found = torch.arange(4) + 7, []
    for step in range(3):
        if step:
            model.gradient_checkpointing_enable({"use_reentrant": step == 1, "preserve_rng_state": False})
        model.zero_grad()
        model(**batch, dropout_keys=keys).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any(name.startswith("model.layers.0") for name in found[0])
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])
    model.gradient_checkpointing_disable()
    with torch.no_grad():
        whole = logits_of(model(**batch, dropout_keys=keys))
        parts = [
            logits_of(model(**{name: value[row : row + 1] for name, value in batch.items()}, dropout_keys=keys[[row]]))
            for row in range(4)
        ]
    assert relative(torch.cat(parts), whole) < 1e-9  # the same masks in any split
    if task not in ("question_answering", "sentence_pretraining"):
        model.config.hidden_dropout = model.config.embedding_dropout = 0.0
        for layer in model.model.layers:
            layer.hidden_dropout = 0.0
        dropped = logits_of(model(**batch, dropout_keys=keys))
        assert not torch.equal(dropped, logits_of(model.eval()(**batch)))


# --- pairs of sentences -----------------------------------------------------------------------------------------------


def test_pairs_in_one_row_are_pairs_alone() -> None:
    """Packed rows give the logits, the loss and the gradients of rows of one pair."""
    model = head_model("bert", "sentence_pretraining")
    first, second = tokens(1, 7, seed=1), tokens(1, 5, seed=2)
    packed = torch.cat((first, second, torch.zeros(1, 2, dtype=torch.long)), dim=1)
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0]])
    labels = packed.masked_fill(tokens(1, 14, seed=5) % 2 == 0, -100)
    labels[:, 12:] = -100
    targets = int((labels != -100).sum())
    together = model(
        input_ids=packed,
        document_ids=documents([7, 5, -2]),
        token_type_ids=types,
        labels=labels,
        sentence_positions=torch.tensor([[0, 7, 0]]),
        sentence_labels=torch.tensor([[1, 0, -100]]),
    )
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for place, (ids, part) in enumerate(((first, slice(0, 7)), (second, slice(7, 12)))):
        alone = model(
            input_ids=ids,
            token_type_ids=types[:, part],
            labels=labels[:, part],
            next_sentence_label=torch.tensor([1 - place]),
            num_items_in_batch=targets,
            item_counts={"pairs": 2},
        )
        assert relative(together.seq_relationship_logits[:, place], alone.seq_relationship_logits) < 1e-9
        assert relative(together.prediction_logits[:, part], alone.prediction_logits) < 1e-9
        alone.loss.backward()
        total += alone.loss.item()
    assert together.loss.item() == pytest.approx(total, rel=1e-9)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-10), name


def test_tokens_and_pairs_are_added() -> None:
    model, batch = head_model("bert", "sentence_pretraining"), head_batch("sentence_pretraining")
    output = model(**batch)
    tokens_loss = functional.cross_entropy(output.prediction_logits.flatten(0, 1), batch["labels"].flatten())
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    scores = linear(model, "seq_relationship", linear(model, "pooler.dense", hidden[:, 0]).tanh())
    assert relative(output.seq_relationship_logits, scores) < 1e-12
    pairs_loss = functional.cross_entropy(scores, batch["next_sentence_label"])
    assert output.loss.item() == pytest.approx((tokens_loss + pairs_loss).item(), rel=1e-9)
    model.train()
    trained = model(**batch)
    assert trained.prediction_logits is None
    assert trained.loss.item() == pytest.approx(output.loss.item(), rel=1e-9)
    halved = model(**batch, num_items_in_batch=10**9, item_counts={"pairs": torch.tensor(8)}).loss
    assert halved.item() == pytest.approx(pairs_loss.item() / 2, rel=1e-6)
    del batch["next_sentence_label"]
    assert model(**batch).loss.item() == pytest.approx(tokens_loss.item(), rel=1e-9)
    with pytest.raises(ValueError, match="sentence_positions"):
        model(**batch, sentence_labels=torch.zeros(4, 1, dtype=torch.long))


def test_token_labels_of_packed_rows_are_those_of_rows_alone() -> None:
    for architecture in ("modernbert", "llama"):
        model = head_model(architecture, "token_classification")
        ids = tokens(1, 12)
        with torch.no_grad():
            packed = model(input_ids=ids, document_ids=documents([5, 7])).logits
            assert relative(packed[:, 5:], model(input_ids=ids[:, 5:]).logits) < 1e-9


# --- at the boundary --------------------------------------------------------------------------------------------------

AUTO = {
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "multiple_choice": AutoModelForMultipleChoice,
    "sentence_pretraining": AutoModelForPreTraining,
}


@pytest.mark.parametrize(("architecture", "task"), HEADS)
def test_what_is_saved_is_found_again(architecture: str, task: str, tmp_path: Any) -> None:
    model, batch = head_model(architecture, task), head_batch(task)
    model.save_pretrained(tmp_path)
    loaded, report = AUTO[task].from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits_of(loaded.eval()(**batch)), logits_of(model(**batch)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(model_from_config(config)) is type(model)
    register_hub_code(model)
    wanted = f"{type(model).__module__.rsplit('.', 1)[-1]}.{type(model).__name__}"
    assert model.config.auto_map[AUTO[task].__name__] == wanted
    assert model.config.auto_map["AutoModel"].endswith("Model")


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'summaries' for a decoder.*token_classification"):
        model_class(tiny_config("gpt2"), "summaries")


def test_choices_need_their_axis() -> None:
    with pytest.raises(ValueError, match=r"\(rows, choices, tokens\)"):
        head_model("bert", "multiple_choice")(input_ids=tokens(2, 5))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(56))]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{role}_token": word for role, word in special.items()},
    )


@pytest.mark.parametrize(
    ("name", "architecture", "task"),
    [
        ("text-classification", "bert", "classification"),
        ("text-classification", "gpt2", "classification"),
        ("token-classification", "modernbert", "token_classification"),
        ("token-classification", "llama", "token_classification"),
        ("fill-mask", "bert", "pretraining"),
        ("feature-extraction", "modernbert", "base"),
        ("text-generation", "llama", "pretraining"),
    ],
)
def test_pipelines_find_the_models(
    name: str, architecture: str, task: str, tokenizer: PreTrainedTokenizerFast, caplog: Any
) -> None:
    model = head_model(architecture, task).float()
    logging.enable_propagation()  # to where `caplog` listens
    run = pipeline(name, model=model, tokenizer=tokenizer, device="cpu")
    keys = {"max_new_tokens": 3} if name == "text-generation" else {}
    text = "word1 [MASK] word3" if name == "fill-mask" else "word1 word2 word3"
    results = [run(text, **keys), run([text, "word4 " + text], batch_size=2, **keys)[0]]
    logging.disable_propagation()
    assert "not supported for" not in caplog.text
    if name == "feature-extraction":
        found = [torch.tensor(result)[0, :5] for result in results]
        assert relative(*found) < 1e-4
        with torch.no_grad():
            wanted = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert relative(found[0], wanted) < 1e-4
    elif name == "text-generation":
        assert all(result[0]["generated_text"].startswith(text) for result in results)
    else:
        first = results[0][0]
        second = results[1] if isinstance(results[1], dict) else results[1][0]
        assert 0 < first["score"] <= 1
        assert first["score"] == pytest.approx(second["score"], rel=1e-3)


def test_answers_can_be_read_off(tokenizer: PreTrainedTokenizerFast) -> None:
    """The installed transformers has no pipeline for answers: a question and its context, straight to a span."""
    model = head_model("bert", "question_answering").float()
    inputs = tokenizer("word1 word2", "word3 word4 word5", return_tensors="pt")
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    with torch.no_grad():
        output = model(**inputs)
    assert output.start_logits.shape == output.end_logits.shape == (1, 8)
