"""Conversations: which tokens are learnt, by templates that say so and by those that do not, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, pipeline
from writing_models import BOS, EOS, build, byte_tokenizer, model_directory, tuning, write_jsonl

from pretrain.config_task import InstructionTask
from pretrain.finetune import finetune
from pretrain.tasks.heads import install
from pretrain.tasks.instructions import Instructions, default_template
from pretrain.tasks.rows import Row

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Is 2 even?"},
    {"role": "assistant", "content": "Yes, 对。"},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "No."},
]
FORGETFUL = """\
{% for message in messages %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' and not loop.last %}...\
{% else %}{{ message['content'] }}{% endif %}{{ eos_token }}{% endfor %}"""


def row(messages: Any, number: int = 1) -> Row:
    return Row({"messages": messages}, f"chat.jsonl:{number}")


def make(*, chatml: bool = False, template: str | None = None, **keys: Any) -> Instructions:
    tokenizer = byte_tokenizer(chatml=chatml)
    tokenizer.chat_template = template
    section = InstructionTask(kind="instructions", train=("x",), **{"max_length": 160, **keys})
    return Instructions(section, tokenizer, causal=True)


@pytest.mark.parametrize("chatml", [False, True])
def test_a_template_that_marks_answers_and_one_that_does_not_teach_the_same(chatml: bool) -> None:
    marked = make(chatml=chatml)
    plain = re.sub(r"\{%-? (end)?generation %\}", "", default_template(marked.tokenizer))
    unmarked = make(chatml=chatml, template=plain)
    assert (marked.marked, unmarked.marked) == (True, False)
    for messages in (CHAT, CHAT[1:], CHAT[1:3]):
        (ids, learnt), (other_ids, other) = marked.tokens(messages), unmarked.tokens(messages)
        assert ids == other_ids
        assert learnt.tolist() == other.tolist()
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        end = "<|im_end|>" if chatml else "</s>"
        said = marked.tokenizer.decode([one for one, wanted in zip(ids, learnt, strict=True) if wanted])
        assert said == "".join(answer + end for answer in answers)
        assert ids[0] == BOS
    assert marked.ends == unmarked.ends == {marked.tokenizer.convert_tokens_to_ids(end)}


def test_the_default_template_is_made_of_tokens_there_are() -> None:
    text = make().tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text == "<s>### system\nBe short.\n### user\nIs 2 even?\n### assistant\n"
    text = make(chatml=True).tokenizer.apply_chat_template(CHAT[1:3], tokenize=False)
    assert text == "<s><|im_start|>user\nIs 2 even?<|im_end|>\n<|im_start|>assistant\nYes, 对。<|im_end|>\n"
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end of text"):
        default_template(tokenizer)


def test_a_template_of_one_s_own_comes_before_the_tokenizer_s(tmp_path: Path) -> None:
    own = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    assert make(template=own).template == own
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}" + own)
    assert make(template=own, root=str(tmp_path), chat_template="mine.jinja").template == "{{ bos_token }}" + own
    with pytest.raises(ValueError, match=r"task.chat_template: `.*absent.jinja` cannot be read"):
        make(root=str(tmp_path), chat_template="absent.jinja")


def test_the_loss_is_the_class_s_own_over_the_answers() -> None:
    task = make()
    arrays = task.collate(task.encode([row(CHAT), row(CHAT[1:3])], training=True))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    answers = ["Yes, 对。", "No.", "Yes, 对。"]
    count = int((batch["labels"] != -100).sum())
    assert count == sum(len(answer.encode()) + 1 for answer in answers)
    model = build("llama", len(task.tokenizer))
    with torch.no_grad():
        own = model(**batch).loss
        install(model, task)
        assert torch.allclose(model(**batch, num_items_in_batch=count).loss, own, rtol=1e-5)


def test_long_conversations_are_cut_and_those_without_answers_left_out() -> None:
    task = make(max_length=64)
    rows = [row(CHAT), row(CHAT[:2]), row([{"role": "user", "content": "x" * 90}, CHAT[2]])]
    (example,) = task.encode(rows, training=True)
    assert (example.row, example.length) == (0, 64)
    assert task.notes[-2:] == [
        "2 of 3 training conversations have more than task.max_length: 64 tokens: cut at the end",
        "2 of 3 training conversations have no answer to learn: left out",
    ]


def test_prompts_and_responses_and_a_system_message() -> None:
    task = make(prompt="q", response="a", system="Be kind.")
    (example,) = task.encode([Row({"q": "Hi", "a": "Hello"}, "x:1")], training=False)
    text = task.tokenizer.decode(example.inputs["input_ids"])
    assert text == "<s>### system\nBe kind.\n### user\nHi\n### assistant\nHello</s>\n"
    assert task.tokenizer.decode(example.extra["prompt"]) == text.removesuffix("Hello</s>\n")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task.prompt and task.response belong together"):
        make(prompt="q")
    section = InstructionTask(kind="instructions", train=("x",))
    with pytest.raises(ValueError, match=r"tunes a decoder"):
        Instructions(section, byte_tokenizer(), causal=False)
    with pytest.raises(ValueError, match=r"chat.jsonl:7: a message is .*must be an object"):
        make().encode([row([{"role": "user"}], 7)], training=True)
    with pytest.raises(ValueError, match=r"chat.jsonl:3: .*writes an earlier turn otherwise"):
        make(template=FORGETFUL).encode([row(CHAT, 3)], training=True)
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with pytest.raises(ValueError, match=r"chat.jsonl:4: the chat template refuses this conversation: user first"):
        make(template=strict).encode([row(CHAT, 4)], training=True)
    unsafe = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match=r"chat.jsonl:5: the chat template refuses"):
        make(template=unsafe).encode([row(CHAT, 5)], training=True)


def test_a_run_saves_the_template_and_a_pipeline_answers_with_it(tmp_path: Path) -> None:
    model = model_directory(tmp_path, "llama", chatml=True, drawn=None)
    chats = [
        {"messages": [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "yes"}]}
        for number in range(24)
    ]
    write_jsonl(tmp_path / "chat.jsonl", chats)
    task = {"kind": "instructions", "train": ["chat.jsonl"], "test": ["chat.jsonl"], "max_length": 96}
    config = tuning(tmp_path, task | {"max_answer_length": 12, "evaluate_limit": 3}, "train.steps=40")
    assert finetune(model, config) == 0
    out = tmp_path / "out" / "tuned"
    found = json.loads((out / "seed-0" / "result.json").read_text())
    assert set(found["test"]) == {"loss", "perplexity", "token_accuracy"}
    assert found["test"]["token_accuracy"] == 1.0
    lines = [json.loads(line) for line in (out / "seed-0" / "predictions-test.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(24))
    said = [line["prediction"] for line in lines]
    assert [one["output"] for one in said[:3]] == ["yes"] * 3
    assert said[3:] == [None] * 21
    assert said[0] == {"messages": chats[0]["messages"][:1], "answer": "yes", "output": "yes"}
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.chat_template == default_template(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"] == [EOS, end]
    chat = pipeline("text-generation", model=str(out / "model"), max_new_tokens=12)
    (answer,) = chat([{"role": "user", "content": "7"}])
    assert answer["generated_text"][-1] == {"role": "assistant", "content": "yes"}
