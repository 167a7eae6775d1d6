"""The lines that use a fine-tuned model as its task was trained: inputs framed and cut alike, answers read alike.

What lives here: Python for each kind of task. What must not: loading (`loading`), or running any of it.
"""

from __future__ import annotations

import json
from typing import Any

from pretrain.cards.facts import Facts
from pretrain.cards.loading import PLACE, auto_class

_NO_GRADIENTS = "with torch.no_grad():"


def use_lines(facts: Facts) -> tuple[str, ...] | None:
    """How the model is used once it is loaded; None where its class says all."""
    assert facts.tuning is not None
    task, kind = facts.tuning.task, facts.tuning.kind
    if facts.model.sentences:
        return None
    cut = f'truncation=True, max_length={task["max_length"]}, return_tensors="pt"'
    if kind in ("classification", "regression"):
        return _of_texts(task, kind, cut)
    if kind == "token-classification":
        return (
            f'inputs = tokenizer("a text of some words", {cut})',
            _NO_GRADIENTS,
            "    numbers = model(**inputs).logits[0].argmax(-1).tolist()",
            "tokens = tokenizer.convert_ids_to_tokens(inputs.input_ids[0])",
            "# the tag of a word is that of its first token",
            "print([(token, model.config.id2label[number]) for token, number in zip(tokens, numbers)])",
        )
    if kind == "text-to-text":
        return _of_decoder(task) if auto_class(facts.model) == "AutoModelForCausalLM" else _of_seq2seq(task, cut)
    if kind == "instructions":
        return _of_instructions(task)
    return None


def _of_texts(task: Any, kind: str, cut: str) -> tuple[str, ...]:
    texts = '"a text", "another"' if task.get("text_pair") is not None else '"a text"'
    lines = (f"inputs = tokenizer({texts}, {cut})", _NO_GRADIENTS, "    logits = model(**inputs).logits[0]")
    if kind == "regression":
        return (*lines, "print(logits.item())")
    if task.get("multi_label"):
        return (
            *lines,
            "shares = logits.sigmoid().tolist()",
            f"print([model.config.id2label[n] for n, share in enumerate(shares) if share >= {task['threshold']:g}])",
        )
    return (
        *lines,
        "shares = logits.softmax(-1).tolist()",
        "print({model.config.id2label[number]: share for number, share in enumerate(shares)})",
    )


def _of_seq2seq(task: Any, cut: str) -> tuple[str, ...]:
    text = json.dumps(task.get("prefix", "") + "a text", ensure_ascii=False)
    return (
        f"inputs = tokenizer({text}, {cut})",
        f"output = model.generate(**inputs, {_longest(task)})",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    )


def _of_decoder(task: Any) -> tuple[str, ...]:
    """Source and separator are cut into tokens apart from each other, as they were in training."""
    text = json.dumps(task.get("prefix", "") + "a text", ensure_ascii=False)
    return (
        "ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]",
        f"for part in ({text}, {json.dumps(task.get('separator', ''), ensure_ascii=False)}):",
        "    ids += tokenizer(part, add_special_tokens=False).input_ids",
        "inputs = torch.tensor([ids])",
        f"output = model.generate(inputs, attention_mask=torch.ones_like(inputs), {_longest(task)})",
        "print(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))",
    )


def _longest(task: Any) -> str:
    return f"max_new_tokens={task['max_target_length']}, num_beams={task['num_beams']}, do_sample=False"


def _of_instructions(task: Any) -> tuple[str, ...]:
    messages = [{"role": "user", "content": "What is a river?"}]
    if task.get("system"):
        messages.insert(0, {"role": "system", "content": task["system"]})
    return (
        f"messages = {json.dumps(messages, ensure_ascii=False)}",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        f"output = model.generate(**inputs, max_new_tokens={task['max_answer_length']}, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    )


def adapter_lines(facts: Facts) -> str:
    """How the adapters alone are put over the base model."""
    assert facts.tuning is not None
    auto = auto_class(facts.model)
    code_too = ", trust_remote_code=True" if facts.model.needs_code else ""
    return "\n".join(
        (
            "from peft import PeftModel",
            f"from transformers import AutoConfig, {auto}",
            "",
            f"base = {json.dumps(facts.tuning.base, ensure_ascii=False)}",
            PLACE + json.dumps(facts.place, ensure_ascii=False),
            f"config = AutoConfig.from_pretrained(place{code_too})",
            f"model = {auto}.from_pretrained(base, config=config{code_too})",
            'model = PeftModel.from_pretrained(model, place, subfolder="adapter").eval()',
        )
    )
