"""What a model in training is measured on beside its validation sets, and at which steps.

What lives here: keys of the section `evaluate`. What must not: how anything is measured.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from pretrain.config_types import Amount, Interval, Positive, Section, amount_in_steps


class MeasuresConfig(Section):
    """Minimal pairs, similarity, retrieval and lm-eval tasks, at chosen steps of a training."""

    minimal_pairs: tuple[str, ...] = Field((), description="files or directories of sentence pairs, as BLiMP has them")
    similarity: tuple[str, ...] = Field((), description="files of two texts and a score; correlation of the cosine")
    retrieval: tuple[str, ...] = Field((), description="files of queries and what answers them")
    tasks: tuple[str, ...] = Field((), description="decoders: names of lm-eval tasks, YAML files, folders of these")
    measure_at: Interval | tuple[Amount, ...] = Field(
        "100%",
        description="when these are scored: every so often and at the end, or a list of steps; default: at the end",
    )
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question of a task")
    limit: Positive | None = Field(None, description="at most this many examples of each file and task")
    pair_fields: tuple[str, ...] = Field((), description="of minimal_pairs: good and bad sentence, and of a group")
    similarity_fields: tuple[str, ...] = Field((), description="of similarity: both texts, and the score")
    retrieval_fields: tuple[str, ...] = Field((), description="of retrieval: the query, and its answer")
    pseudo_likelihood: Literal["within-word", "original"] = Field(
        "within-word", description="masked models: hide the rest of a token's word, too, or the token alone"
    )

    def measures_at(self, step: int, total_steps: int) -> bool:
        """Whether a training of so many steps is measured after step `step`."""
        if isinstance(self.measure_at, tuple):
            return step in {amount_in_steps(amount, total_steps) for amount in self.measure_at}
        return step > 0 and (step == total_steps or step % max(1, amount_in_steps(self.measure_at, total_steps)) == 0)

    @property
    def has_measures(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self.minimal_pairs or self.similarity or self.retrieval or self.tasks)

    @property
    def needs_head(self) -> bool:
        """Whether any of them asks for a likelihood; a vector can be had of any model of text."""
        return bool(self.minimal_pairs or self.tasks)

    def check_objective(self, kind: str) -> None:
        """Refuse what a model of this objective cannot be measured on.

        Raises:
            ValueError: names the key and the remedy.
        """
        fitting = {
            "minimal_pairs": ("causal", "mlm"),
            "tasks": ("causal",),
            "similarity": ("causal", "mlm", "rtd"),
            "retrieval": ("causal", "mlm", "rtd"),
        }
        for key, kinds in fitting.items():
            if getattr(self, key) and kind not in kinds:
                raise ValueError(
                    f"evaluate.{key} is for objective.kind {' or '.join(kinds)}, not {kind}; leave it out, and score "
                    "the exported model with `pretrain evaluate` where that takes it"
                )


def measures_of(**given: Any) -> MeasuresConfig:
    """What a command line asks for; lists may stand for tuples, None for what is not given.

    Raises:
        ValueError: names the option and its value.
    """
    entries = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if value is not None
    }
    try:
        return MeasuresConfig.model_validate(entries)
    except ValidationError as error:
        found = error.errors()[0]
        option = str(found["loc"][0]).replace("_", "-")
        raise ValueError(f"--{option} {found['input']}: {found['msg']}") from error
