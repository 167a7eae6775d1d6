"""Conversations for a decoder: it learns what the assistant says, and nothing of what others say.

What lives here: conversations as a chat template writes them, which tokens of one are the assistant's, answers to the
last turn. What must not: the loss, or how text is generated (`writing`).

A template is rendered by transformers alone, in its sandbox. One with `{% generation %}` says itself what is the
assistant's; of another it is what a turn adds to the conversation before it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from pretrain.config_task import InstructionTask
from pretrain.tasks.base import Evaluated, Evaluation
from pretrain.tasks.examples import Example
from pretrain.tasks.rows import Row
from pretrain.tasks.writing import WritingTask, decoder_example, stop_at

Message = dict[str, Any]

ASSISTANT, SYSTEM, USER = "assistant", "system", "user"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CHATML = ("<|im_start|>", "<|im_end|>")
_TEMPLATE = """\
{BOS}{%- for message in messages %}{{ '{OPEN}' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + {END} }}{% endgeneration %}{% else %}{{ message['content']{CLOSE} }}{% endif %}
{{ '\\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '{OPEN}assistant\\n' }}{% endif %}"""


def default_template(tokenizer: Any) -> str:
    """ChatML where a tokenizer has its two tokens; else the same with the marks of a heading, and EOS after answers.

    Raises:
        ValueError: when the tokenizer has nothing that could end an answer.
    """
    known = tokenizer.get_vocab()
    opening, closing = _CHATML
    bos = "{{ bos_token }}" if tokenizer.bos_token is not None else ""
    if opening in known and closing in known:
        parts = {"{BOS}": bos, "{OPEN}": opening, "{END}": f"'{closing}'", "{CLOSE}": f" + '{closing}'"}
    elif tokenizer.eos_token is not None:
        parts = {"{BOS}": bos, "{OPEN}": "### ", "{END}": "eos_token", "{CLOSE}": ""}
    else:
        raise ValueError(
            "task.chat_template: the tokenizer has no end of text (eos_token) and no <|im_end|>, so the default "
            "template has nothing that ends an answer; give a template, or a model whose tokenizer has one"
        )
    template = _TEMPLATE
    for name, part in parts.items():
        template = template.replace(name, part)
    return template


class Instructions(WritingTask):
    """Conversations, learnt by what the assistant says in every turn of it, and where each of its turns ends.

    `loss`, `perplexity` and `token_accuracy` are of those tokens. Of `evaluate_limit` test conversations the best model
    writes the last answer, for reading: nothing counts how good it is.
    """

    section: InstructionTask

    def __init__(self, section: InstructionTask, tokenizer: Any, *, causal: bool) -> None:
        super().__init__(section, tokenizer, causal=causal)
        if not causal:
            raise ValueError(
                "task.kind: instructions tunes a decoder, and this model is none; give a model that is one"
            )
        if (section.prompt is None) != (section.response is None):
            raise ValueError("task.prompt and task.response belong together; give both, or task.messages")
        if section.chat_template is not None:
            tokenizer.chat_template = _read_template(section)
        elif not tokenizer.chat_template:
            tokenizer.chat_template = default_template(tokenizer)
            self.notes.append(
                "the tokenizer has no chat template: the default one is used, and saved with it (chat_template.jinja)"
            )
        self.template = str(tokenizer.get_chat_template())
        self.marked = _GENERATION.search(self.template) is not None
        self.ends: set[int] = set()

    def made_of(self) -> dict[str, str]:
        """The template's digest."""
        return {"chat_template": hashlib.sha256(self.template.encode()).hexdigest()}

    def prepare_model(self, model: Any) -> None:
        """Let whoever loads the model stop where an answer ends."""
        stop_at(model, self.ends)

    # --- examples ----------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], *, training: bool) -> list[Example]:
        """One example a conversation; those in which nothing is the assistant's are left out, long ones cut."""
        section = self.section
        examples, silent, cut = [], 0, 0
        for place, row in enumerate(rows):
            messages = self._messages(row)
            try:
                ids, learnt = self.tokens(messages) if any(_is_answer(one) for one in messages) else ([], np.zeros(0))
                asked = {} if training else self._asked(messages)
            except (TemplateError, TypeError) as error:
                raise ValueError(f"{row.where}: the chat template refuses this conversation: {error}") from error
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
            cut += len(ids) > section.max_length
            ids, learnt = ids[: section.max_length], learnt[: section.max_length]
            if not learnt[1:].any():
                silent += 1
                continue
            examples.append(decoder_example(ids, learnt, place, asked))
        which = "training" if training else "held-out"
        if cut:
            self.notes.append(
                f"{cut:,} of {len(rows):,} {which} conversations have more than task.max_length: {section.max_length} "
                "tokens: cut at the end"
            )
        if silent:
            self.notes.append(f"{silent:,} of {len(rows):,} {which} conversations have no answer to learn: left out")
        return examples

    def _messages(self, row: Row) -> list[Message]:
        """The conversation of a row."""
        section = self.section
        if section.prompt is not None and section.response is not None:
            found: list[Any] = [
                {"role": USER, "content": row.text(section.prompt)},
                {"role": ASSISTANT, "content": row.text(section.response)},
            ]
        else:
            assert section.messages is not None
            value = row[section.messages]
            found = list(value) if isinstance(value, list | tuple) else [value]
        for message in found:
            if not (
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            ):
                raise ValueError(
                    f"{row.where}: a message is {str(message)[:80]!r}, and must be an object with the texts `role` and "
                    "`content`; task.messages names the column of their lists"
                )
        if section.system is not None and not any(message["role"] == SYSTEM for message in found):
            found = [{"role": SYSTEM, "content": section.system}, *found]
        return found

    def tokens(self, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
        """The ids of a conversation, and (length,) whether each is the assistant's.

        Raises:
            ValueError: when the template writes an earlier turn otherwise once others follow.
            TemplateError: when it refuses the conversation.
        """
        if self.marked:
            made = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            ids, learnt = list(made["input_ids"]), np.array(made["assistant_masks"], dtype=bool)
        else:
            text, spans = self._spans(messages)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, places = list(encoded["input_ids"]), np.array(encoded["offset_mapping"]).reshape(-1, 2)
            learnt = np.zeros(len(ids), dtype=bool)
            for begin, end in spans:
                learnt |= (places[:, 0] < end) & (places[:, 1] > begin)
        lasts = np.flatnonzero(learnt & ~np.append(learnt[1:], False))
        self.ends |= {ids[last] for last in lasts} & set(self.tokenizer.all_special_ids)
        return ids, learnt

    def _spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where in it each of the assistant's turns begins and ends."""
        text, spans = self._text(messages), []
        special = tuple(self.tokenizer.all_special_tokens)
        for number, message in enumerate(messages):
            if not _is_answer(message):
                continue
            before = self._text(messages[:number], add_generation_prompt=True) if number else ""
            after = self._text(messages[: number + 1])
            if not text.startswith(after) or not after.startswith(before):
                raise ValueError(
                    "the chat template writes an earlier turn otherwise once others follow it, so that what the "
                    "assistant says cannot be told; mark that in it with {% generation %} and {% endgeneration %}"
                )
            bare = after.rstrip()  # what follows the token that ends an answer is no part of it
            end = len(bare) if bare.endswith(special) and len(bare) > len(before) else len(after)
            spans.append((len(before), end))
        return text, spans

    def _text(self, messages: Sequence[Message], **keys: Any) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **keys))

    def _asked(self, messages: Sequence[Message]) -> dict[str, Any]:
        """What the last answer answers, as ids, and both as text."""
        answers = [number for number, message in enumerate(messages) if _is_answer(message)]
        if not answers or not answers[-1]:
            return {}
        before = list(messages[: answers[-1]])
        made = self.tokenizer.apply_chat_template(
            before, tokenize=True, return_dict=True, add_generation_prompt=True, tokenizer_kwargs={"verbose": False}
        )
        return {"prompt": list(made["input_ids"]), "messages": before, "answer": messages[answers[-1]]["content"]}

    # --- scores ------------------------------------------------------------------------------------------------------

    def score(self, rows: Sequence[Row], examples: Sequence[Example], predictions: Sequence[Any]) -> Evaluated:
        """How many tokens of the answers are foreseen, each after the right ones before it."""
        return Evaluated(self.token_accuracy(predictions), [None] * len(rows))

    def more_scores(self, asked: Evaluation, found: Evaluated) -> Evaluated:
        """At the end what the model answers in the first test conversations, for reading."""
        found = super().more_scores(asked, found)
        if asked.part != "test":
            return found
        room = self.section.max_length - self.section.max_answer_length
        fitting = [example for example in asked.examples if 0 < len(example.extra.get("prompt", ())) <= room]
        fitting = fitting[: self.section.evaluate_limit]
        prompts = [example.extra["prompt"] for example in fitting]
        outputs = self.write(asked, prompts, max_new_tokens=self.section.max_answer_length, stops=self.ends)
        said: list[Any] = [None] * len(asked.rows)
        for example, output in zip(fitting, outputs, strict=True):
            said[example.row] = {name: example.extra[name] for name in ("messages", "answer")} | {"output": output}
        return Evaluated(found.scores, said)


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == ASSISTANT)


def _read_template(section: InstructionTask) -> str:
    path = Path(section.root or ".") / str(section.chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task.chat_template: `{path}` cannot be read ({error}); check the path") from None
