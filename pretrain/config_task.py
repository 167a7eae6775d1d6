"""The configuration of a fine-tuning: one YAML file a task. This file reads as the manual of its keys.

What lives here: the schema and reading it. What must not: torch, or any reading of data.

Beside `task` and `model`, the sections are those of a pretraining (`config_loop.py`), with defaults for fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, StrictBool, model_validator

from pretrain.config import load_as
from pretrain.config_loop import (
    BUDGETS,
    LoopCheckpointConfig,
    LoopConfig,
    LoopEvaluateConfig,
    LoopTrainConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from pretrain.config_types import Interval, OpenShare, Place, Positive, Section, Share

Format = Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "conll", "conllu", "squad"]
Column = str | int
Columns = Column | tuple[Column, ...]


class HeldOut(Section):
    """Validation or test examples taken out of the training ones."""

    fraction: OpenShare = Field(description="share of the rows, by a hash of the columns that the task names")
    by: Column | None = Field(None, description="rows with one value in this column stay together (an article, say)")


class TaskSection(Section):
    """What every task has: examples, and how long an input may be."""

    root: str | None = Field(None, description="the directory that relative files lie in; none: the current one")
    train: tuple[Place, ...] = Field(min_length=1, description="files, globs, or hub:NAME[/CONFIG][:SPLIT]")
    validation: tuple[Place, ...] | HeldOut = Field(
        HeldOut(fraction=0.1), description="files like train, or {fraction: 0.1}: decides which checkpoint is best"
    )
    test: tuple[Place, ...] | HeldOut = Field(
        (), description="files like train, or {fraction: 0.1}: scored once, by the best checkpoint"
    )
    format: Format = Field("auto", description="of the files; auto: by their names")
    columns: tuple[str, ...] | None = Field(
        None, description="names of the columns of csv, tsv and conll files; none: the first line (conll: 0, 1, ...)"
    )
    quoting: StrictBool | None = Field(None, description="whether quotes enclose fields; none: in csv, not in tsv")
    max_length: Positive = Field(128, description="tokens of an input, special ones included")
    train_limit: Positive | None = Field(
        None, description="use this many training rows, by a hash of the task's columns"
    )
    metric: str | None = Field(None, description="decides which checkpoint is best; none: the task's own")


class LabelledSentences(TaskSection):
    """Inputs of one text or two."""

    text: Columns = Field("text", description="the column, or columns that are joined")
    text_pair: Columns | None = Field(None, description="the same, of the second text")
    label: Column = "label"


class ClassificationTask(LabelledSentences):
    """One label a sentence or pair, or several."""

    kind: Literal["classification"]
    labels: tuple[str, ...] | Place | None = Field(
        None, description="their names in order, or a file of one a line; none: those of the training rows, sorted"
    )
    multi_label: StrictBool = Field(False, description="any number of labels a row, parted by label_separator")
    label_separator: str = ","
    threshold: Share = Field(0.5, description="multi_label: a label is given from this probability on")
    ignore_labels: tuple[str, ...] = Field((), description="rows with one of these are left out, and counted")


class RegressionTask(LabelledSentences):
    """A number a sentence or pair."""

    kind: Literal["regression"]


class TokenTask(TaskSection):
    """A tag a word."""

    kind: Literal["token-classification"]
    tokens: Column = Field("tokens", description="the column of words; jsonl: a list of them")
    tags: Column = Field("tags", description="the column of tags; jsonl: a list of them")
    spans: StrictBool | None = Field(None, description="whether tags are BIO spans; none: if they begin with B- or I-")


class QuestionAnsweringTask(TaskSection):
    """A span of a context that answers a question; SQuAD's form (1.1 and 2.0)."""

    kind: Literal["question-answering"]
    max_length: Positive = 384
    stride: Positive = Field(128, description="tokens that neighbouring windows of a long context share")
    max_answer_length: Positive = Field(30, description="tokens")
    characters: StrictBool = Field(False, description="F1 over characters, for scripts without spaces (CMRC 2018)")


class MultipleChoiceTask(TaskSection):
    """Which of several endings fits."""

    kind: Literal["multiple-choice"]
    question: Columns = Field("question", description="the column, or columns that are joined")
    choices: Columns = Field("choices", description="a column of lists, or a column each")
    label: Column = Field("label", description="number of the right choice, from 0, or its letter or text")


class TextTask(TaskSection):
    """A text from a text: translation, summarization, or anything that can be written so."""

    kind: Literal["text-to-text"]
    source: Column = "source"
    target: Column = "target"
    prefix: str = Field("", description="before each source, as T5 was trained with: 'translate English to German: '")
    separator: str = Field("\n", description="a decoder's: between source and target")
    max_target_length: Positive = 128
    num_beams: Positive = 1
    scores: tuple[Literal["bleu", "chrf", "rouge", "exact_match"], ...] = ("bleu", "chrf")
    bleu_tokenizer: Literal["auto", "13a", "intl", "zh", "char", "none"] = "auto"
    evaluate_limit: Positive | None = Field(None, description="outputs at an evaluation; none: all of validation")


class InstructionTask(TaskSection):
    """Conversations for a decoder: the loss is on what the assistant says."""

    kind: Literal["instructions"]
    max_length: Positive = 512
    messages: Column | None = Field("messages", description="a column of lists of {role, content}")
    prompt: Column | None = Field(None, description="in place of messages: the column of what is asked")
    response: Column | None = Field(None, description="and that of the answer")
    system: str | None = Field(None, description="a system message before conversations that have none")
    chat_template: Place | None = Field(
        None, description="a Jinja file; none: the tokenizer's own, else one of three lines (ChatML)"
    )
    max_answer_length: Positive = Field(128, description="tokens of an answer that is written out")
    evaluate_limit: Positive = Field(64, description="test conversations whose last answer is written out at the end")


class EmbeddingTask(TaskSection):
    """Sentence vectors: texts that belong together lie together (mean pooling)."""

    kind: Literal["embeddings"]
    anchor: Column = "anchor"
    positive: Column = "positive"
    negative: Column | None = None
    score: Column | None = Field(None, description="in place of negatives: how alike the two are, a number")
    score_range: tuple[float, float] = Field((0.0, 1.0), description="of `score`")
    scale: Annotated[float, Field(gt=0.0)] = Field(20.0, description="what similarities are multiplied by")


TaskConfig = (
    ClassificationTask
    | RegressionTask
    | TokenTask
    | QuestionAnsweringTask
    | MultipleChoiceTask
    | TextTask
    | InstructionTask
    | EmbeddingTask
)


class LoraConfig(Section):
    """Low-rank adapters through PEFT (Hu et al. 2021) in place of training every weight."""

    rank: Positive = 16
    alpha: Positive | None = Field(None, description="none: twice the rank")
    dropout: Share = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = Field("all-linear", description="names of modules")


class TunedModel(Section):
    """The model that is fine-tuned; the command line names it."""

    from_: Place | None = Field(None, alias="from", description="a Hugging Face model directory, or a Hub name")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: the same shape with new weights, to see what pretraining gave"
    )
    classifier_pooling: Literal["cls", "mean", "late"] | None = Field(
        None, description="how an encoder that lets choose makes one vector of a text (ModernBERT, EuroBERT, ours)"
    )
    lora: LoraConfig | Positive | None = Field(
        None, description="train adapters: their rank, or a section; optimizer.lr is then 5e-4"
    )

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters to train, if any."""
        return LoraConfig(rank=self.lora) if isinstance(self.lora, int) else self.lora


class TuneTrainConfig(LoopTrainConfig):
    """The loop. One budget; by default three epochs."""

    batch_size: Positive = Field(32, description="examples an optimizer step, over all processes")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="a run each: of the head's first weights, the order, dropout"
    )

    @model_validator(mode="before")
    @classmethod
    def _three_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and not any(key in values for key in BUDGETS):
            return {**values, "epochs": 3.0}
        return values

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names one twice; each is a run of its own")
        if "seed" in self.model_fields_set and self.seeds != (self.seed,):
            raise ValueError("seed: a fine-tuning has train.seeds, a list; give that")
        return self


class TuneEvaluateConfig(LoopEvaluateConfig):
    """When validation is scored, and when enough is enough. The best scored checkpoint is the result."""

    every: Interval = "20%"
    patience: Positive | None = Field(None, description="evaluations without a better one that end the run")


class TuningConfig(LoopConfig):
    """A fine-tuning: a task, the model it starts from, and how it is trained."""

    task: TaskConfig = Field(discriminator="kind")
    model: TunedModel = TunedModel()
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", lr=5e-5, weight_decay=0.01, betas=(0.9, 0.999))
    schedule: ScheduleConfig = ScheduleConfig(kind="linear", warmup="6%")
    train: TuneTrainConfig = TuneTrainConfig(epochs=3.0)
    evaluate: TuneEvaluateConfig = TuneEvaluateConfig()
    checkpoint: LoopCheckpointConfig = LoopCheckpointConfig(keep=1)

    @model_validator(mode="before")
    @classmethod
    def _adapters_learn_faster(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if isinstance(model, dict) and model.get("lora") is not None and "optimizer" not in values:
            own: OptimizerConfig = cls.model_fields["optimizer"].default
            return {**values, "optimizer": {**own.model_dump(exclude_unset=True), "lr": 10 * own.lr}}
        return values

    @model_validator(mode="after")
    def _kept_here(self) -> Self:
        if self.checkpoint.to is not None:
            raise ValueError(
                f"checkpoint.to: {self.checkpoint.to}: a fine-tuning keeps its checkpoints in its own "
                "directory; remove it"
            )
        return self

    _inputs: int = PrivateAttr(default=1)

    def with_inputs(self, inputs: int) -> TuningConfig:
        """The same, told how many inputs an example is at most: the choices of a row, the texts of a pair."""
        told = self.model_copy()
        told._inputs = inputs
        return told

    @property
    def row_tokens(self) -> int:
        """Token positions of an example, at most: of all its inputs, and of the text that is written."""
        written = self.task.max_target_length if isinstance(self.task, TextTask) else 0
        return self.task.max_length * self._inputs + written

    @property
    def rows_meet(self) -> bool:
        """Of sentence vectors without scores: the other texts of a micro-batch are what a row is told from."""
        return isinstance(self.task, EmbeddingTask) and self.task.score is None

    @property
    def rows_per_batch(self) -> int:
        """`train.batch_size`."""
        return self.train.batch_size

    @property
    def save_every(self) -> str | int:
        """`evaluate.every`: any checkpoint that was scored may be the best one."""
        return self.evaluate.every

    @property
    def attention_dropout(self) -> float:
        """Not known before the model is read: taken for one that draws."""
        return 1.0

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain data; what was not given is left out."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if self.schedule.kind != "wsd":
            plain["schedule"].pop("decay")
        if self.optimizer.name != "muon":
            plain["optimizer"].pop("momentum")
        return plain

    def of_seed(self, seed: int) -> TuningConfig:
        """The configuration of one seed's run, which lies in OUT/NAME/seed-N."""
        return self.model_copy(
            update={
                "name": f"seed-{seed}",
                "out": str(self.directory),
                "train": self.train.model_copy(update={"seed": seed, "seeds": (seed,)}),
            }
        )


def load_tuning(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TuningConfig:
    """Read the configuration of a fine-tuning: a YAML file, or a shipped task by name, with overrides `key=value`.

    Raises:
        ConfigError: on unknown keys, wrong types, impossible combinations.
    """
    return load_as(TuningConfig, "tasks", name_or_path, overrides)
