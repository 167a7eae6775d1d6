"""How to load a model where this project is not installed: lines that run as they stand.

What lives here: which class a model is for, and the lines for each. What must not: loading it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.cards.facts import GENERATOR, Model

PLACE = "place = "
"""How the line begins that says where the model is."""

_USE: Mapping[str, tuple[str, ...]] = {
    "AutoModelForMaskedLM": (
        'text = f"one {tokenizer.mask_token} three"',
        'inputs = tokenizer(text, return_tensors="pt")',
        "with torch.no_grad():",
        "    logits = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]",
        "print(tokenizer.convert_ids_to_tokens(logits.topk(5).indices[0]))",
    ),
    "AutoModelForCausalLM": (
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=8)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ),
    "AutoModelForSeq2SeqLM": (
        'inputs = tokenizer("a text", return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=8)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ),
    "AutoModelForSequenceClassification": (
        'inputs = tokenizer("a text", return_tensors="pt")',
        "with torch.no_grad():",
        "    logits = model(**inputs).logits[0]",
        "print({model.config.id2label[number]: value for number, value in enumerate(logits.tolist())})",
    ),
    "AutoModelForTokenClassification": (
        'inputs = tokenizer("a text", return_tensors="pt")',
        "with torch.no_grad():",
        "    logits = model(**inputs).logits[0]",
        "print([model.config.id2label[number] for number in logits.argmax(-1).tolist()])",
    ),
    "AutoModelForQuestionAnswering": (
        'inputs = tokenizer("who ran?", "the dog ran", return_tensors="pt")',
        "with torch.no_grad():",
        "    output = model(**inputs)",
        "print(output.start_logits.argmax().item(), output.end_logits.argmax().item())",
    ),
    "AutoModelForMultipleChoice": (
        'inputs = tokenizer(["a text"] * 2, ["one end", "another"], padding=True, return_tensors="pt")',
        "with torch.no_grad():",
        "    logits = model(**{name: tensor[None] for name, tensor in inputs.items()}).logits",
        "print(logits.argmax(-1).item())",
    ),
}
_DETECT = (
    'inputs = tokenizer("a text with a wrong word", return_tensors="pt")',
    "with torch.no_grad():",
    "    logits = model(**inputs).logits[0]",
    "print((logits > 0).tolist())  # True: this token was replaced",
)
_PAIR = (
    'inputs = tokenizer("one segment", "another", return_tensors="pt")',
    "with torch.no_grad():",
    "    output = model(**inputs)",
    "print(output.prediction_logits.shape)",
)
_STACK = (
    'inputs = tokenizer("a text", return_tensors="pt")',
    "with torch.no_grad():",
    "    states = model(**inputs).last_hidden_state",
    "print(states.shape)",
)
_ENDINGS = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "MTModel": "AutoModelForSeq2SeqLM",
    "MarianMTModel": "AutoModelForSeq2SeqLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForReplacedTokenDetection": "AutoModelForPreTraining",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
}
PIPELINES = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModel": "feature-extraction",
}
"""The Hub's pipeline of an Auto class; none for the others."""


@dataclass(frozen=True)
class Lines:
    """Python that loads and uses a model, and what it needs to be installed."""

    code: str
    needs: str


def auto_class(model: Model) -> str:
    """The Auto class that a model is for: by its code's map, else by how its class is called."""
    own = model.architecture
    for auto, path in (model.config.get("auto_map") or {}).items():
        if own and auto.startswith("AutoModelFor") and str(path).rpartition(".")[2] == own:
            return str(auto)
    return next((auto for ending, auto in _ENDINGS.items() if own.endswith(ending)), "AutoModel")


def is_detector(model: Model) -> bool:
    """Whether it tells replaced tokens from others."""
    own = model.architecture
    return (own.startswith("Electra") and own.endswith("ForPreTraining")) or own.endswith("ForReplacedTokenDetection")


def lines_for(model: Model, place: str, use: tuple[str, ...] | None = None) -> Lines:
    """The lines that load a model from a place, a directory or the name of a repository, and use it once.

    Args:
        model: that is loaded.
        place: a directory, or the name of a repository.
        use: lines that use it; None: those for its class.
    """
    where = PLACE + json.dumps(place, ensure_ascii=False)
    if model.sentences:
        code = (
            "from sentence_transformers import SentenceTransformer",
            "",
            where,
            "model = SentenceTransformer(place)",
            'print(model.encode(["a text", "another"]).shape)',
        )
        return Lines("\n".join(code), "sentence-transformers")
    auto = auto_class(model)
    code_too = ", trust_remote_code=True" if model.needs_code else ""
    if use is None and auto == "AutoModelForPreTraining":
        use = _DETECT if is_detector(model) else _PAIR
    elif use is None:
        use = _USE.get(auto, _STACK)
    classes = [auto, "AutoTokenizer"]
    torch = ("import torch",) if any("torch." in line for line in use) else ()
    more: tuple[str, ...] = ()
    if model.generator is not None:
        generator = auto_class(model.generator)
        folder = f'subfolder="{GENERATOR}"'
        more = (
            "",
            "# what it was trained against: a masked model that fills gaps",
            f"generator = {generator}.from_pretrained(place, {folder}{code_too}).eval()",
        )
        classes.append(generator)
    code = (
        *torch,
        f"from transformers import {', '.join(sorted(set(classes)))}",
        "",
        where,
        f"tokenizer = AutoTokenizer.from_pretrained(place{code_too})",
        f"model = {auto}.from_pretrained(place{code_too}).eval()",
        *use,
        *more,
    )
    return Lines("\n".join(code), "torch and transformers")
