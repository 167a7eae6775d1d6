"""Transformers' own tests of models, against every class of `pretrain.models`; runs inside its unpacked `tests`.

What lives here: for each class and design a small config with inputs, and the test class that joins them with
transformers' mixins; what is skipped by name, with the reason. What must not: assertions of our own.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

from pretrain.models import LoomConfig, LoomPreTrainedModel, loom_config, model_class

# task -> the list in which transformers' tests look a class up, to know which labels it takes
_LISTS = {
    "base": "MODEL_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "multiple_choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
}
_PRETRAINING_LISTS = {
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "decoder": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Designs that differ in every part: norms, positions, windows, groups of heads, shared layers, MLPs, ties. Smoothed
# labels keep a loss far from 0, and a test wants it there.
DESIGNS: dict[str, dict[str, dict[str, Any]]] = {
    "encoder": {
        "bert": {},
        "albert": {"embedding_size": 16},
        "modernbert": {"local_window": 4, "global_attention_every": 2},
        "electra": {"embedding_size": 16},
    },
    "decoder": {
        "gpt2": {},
        "llama": {"num_key_value_heads": 2},
        "modernbert-decoder": {"local_window": 4, "global_attention_every": 2},
    },
    "seq2seq": {
        "transformer": {"decoder_start_token_id": 1, "label_smoothing": 0.0},
        "t5": {"decoder_start_token_id": 1, "head_dim": 8},
    },
}
_ALL_ENCODERS, _ALL_DECODERS = ("bert", "albert", "modernbert"), ("gpt2", "llama", "modernbert-decoder")
_HEADED = ("bert", "modernbert")  # what stands before a classifier differs
TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "encoder": {
        "base": _ALL_ENCODERS,
        "pretraining": _ALL_ENCODERS,
        "sentence_pretraining": ("bert",),
        "replaced_token_detection": ("bert", "electra"),
        "classification": _HEADED,
        "token_classification": _HEADED,
        "question_answering": _HEADED,
        "multiple_choice": _HEADED,
    },
    "decoder": {
        "base": _ALL_DECODERS,
        "pretraining": _ALL_DECODERS,
        "classification": _ALL_DECODERS[1:],
        "token_classification": _ALL_DECODERS[1:],
        "question_answering": _ALL_DECODERS[1:],
    },
    "seq2seq": {"base": ("transformer", "t5"), "pretraining": ("transformer", "t5")},
}


class _Inputs:
    """What transformers' mixins ask a model for: a config, inputs, sizes."""

    is_training = True
    batch_size, seq_length, num_choices = 7, 7, 3
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, design: str, task: str) -> None:
        self.design, self.task = design, task
        kind = next(kind for kind, designs in DESIGNS.items() if design in designs)
        self.kind, self.keys = kind, _SIZES | DESIGNS[kind][design]
        if task == "replaced_token_detection" and design == "bert":  # electra's: the discriminator alone
            self.keys = self.keys | {"generator_size": 0.5}
        self.encoder_seq_length = self.decoder_seq_length = self.key_length = self.seq_length

    def get_config(self) -> LoomConfig:
        config = loom_config(self.design, **self.keys)
        if self.task == "token_classification":
            config.num_labels = 20  # the test that learns a batch by heart labels tokens 1 to 19
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[LoomConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(3, self.vocab_size, shape)
        inputs = {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long)}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.randint(3, self.vocab_size, shape)
            inputs["decoder_attention_mask"] = torch.ones(shape, dtype=torch.long)
        return self.get_config(), inputs


# Shared layers need more steps to learn a batch by heart.
SLOW_LEARNERS = (("albert", "pretraining"),)
# (design or * for all, task, test) -> why it is not run
SKIPPED = {
    ("*", "replaced_token_detection", "test_model_outputs_equivalence"): "subtracts outputs: `is_replaced` is boolean",
    ("bert", "replaced_token_detection", "test_training_overfit"): "a generator draws new replacements at every step",
}


class _Case(ModelTesterMixin, TensorParallelTesterMixin):
    """The mixin's tests and the config's; the classes below say which class and design."""

    test_can_init_all_missing_weights_before_2023 = True
    design, task = "", ""

    def setUp(self) -> None:
        self.model_tester = _Inputs(self.design, self.task)
        self.config_tester = ConfigTester(
            self, config_class=type(self.model_tester.get_config()), architecture=self.design, **self.model_tester.keys
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs: Any, found: Any, return_labels: bool = False) -> dict[str, Any]:
        """Adds the labels of the two classes for which transformers has no list."""
        prepared: dict[str, Any] = super()._prepare_for_class(inputs, found, return_labels=return_labels)
        if return_labels and self.task in ("sentence_pretraining", "replaced_token_detection"):
            shape = (self.model_tester.batch_size, self.model_tester.seq_length)
            prepared["labels"] = torch.zeros(shape, dtype=torch.long)
            if self.task == "sentence_pretraining":
                prepared["next_sentence_label"] = torch.zeros(shape[0], dtype=torch.long)
        return prepared


class _Trained(TrainingTesterMixin):
    """The test that a model learns a batch by heart, with the labels of each task."""

    def _create_text_training_batch(self, batch_size: int, seq_length: int, vocab_size: int) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = super()._create_text_training_batch(batch_size, seq_length, vocab_size)
        rows = torch.arange(batch_size)
        if self.task == "classification":
            batch["labels"] = rows % 2
        elif self.task == "question_answering":
            del batch["labels"]
            batch |= {"start_positions": rows + 3, "end_positions": rows + 5}
        elif self.is_encoder_decoder:  # the output goes on from the first token, which is all that the encoder sees
            ids = batch["input_ids"]
            batch["attention_mask"] = (torch.arange(seq_length) == 0).long().expand(batch_size, -1)
            batch["labels"] = torch.cat([ids[:, 1:], ids.new_full((batch_size, 1), -100)], dim=1)
        elif self.task == "multiple_choice":
            ids = torch.stack([batch["input_ids"], batch["input_ids"].flip(1)], dim=1)  # (rows, choices, tokens)
            batch = {"input_ids": ids, "labels": rows % 2}
        if self.task in ("classification", "question_answering"):
            batch["input_ids"] = batch["input_ids"] + 20 * rows[:, None]  # rows with other labels differ
        if self.task == "multiple_choice":
            batch["input_ids"][rows % 2 == 1] = batch["input_ids"][rows % 2 == 1].flip(1)
        return batch


def _cases() -> dict[str, type[unittest.TestCase]]:
    made = {}
    for tasks in TASKS.values():
        for task, designs in tasks.items():
            for design in designs:
                config = loom_config(design, **_SIZES)
                found = model_class(config, task)
                made[f"{found.__name__}__{design.replace('-', '_')}"] = _case(found, design, task)
                _list(config, found, task)
    return made


def _case(found: type[LoomPreTrainedModel], design: str, task: str) -> type[unittest.TestCase]:
    keys: dict[str, Any] = {"all_model_classes": (found,), "design": design, "task": task, "model_tester": None}
    keys["is_encoder_decoder"] = design in DESIGNS["seq2seq"]
    skipped = {test: why for (of, kind, test), why in SKIPPED.items() if of in ("*", design) and kind == task}
    bases: list[type] = [_Case, unittest.TestCase]
    if task != "base":
        bases.insert(0, _Trained)
        keys["training_overfit_steps"] = 600 if (design, task) in SLOW_LEARNERS else 300
    if found.can_generate():
        bases[-1:] = [FSDPTesterMixin, GenerationTesterMixin, unittest.TestCase]
        if not any(name.startswith("test") for name in dir(GenerationTesterMixin)):  # an empty one in its place
            reason = "the tests of generation are not in the source distribution"
            skipped["test_generation_tester_mixin_inheritance"] = reason
    keys |= {test: _skipped(test, reason) for test, reason in skipped.items()}
    return type(found.__name__, tuple(bases), keys)


def _skipped(name: str, reason: str) -> Any:
    def test(self: unittest.TestCase) -> None:
        self.skipTest(reason)

    test.__name__ = name
    return test


def _list(config: LoomConfig, found: type[LoomPreTrainedModel], task: str) -> None:
    """Put a class where the tests look for its kind."""
    name = _PRETRAINING_LISTS[config.kind] if task == "pretraining" else _LISTS.get(task)
    if name is not None:
        getattr(modeling_auto, name)[config.model_type] = found.__name__


globals().update(_cases())
