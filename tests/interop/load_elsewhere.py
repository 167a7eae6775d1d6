"""Run by `test_ecosystem_pipelines.py` in a process that cannot import `pretrain`: what published models say there.

Usage: python load_elsewhere.py ROOT. Reads ROOT/cases.json, a list of {name, task, directory, code}; writes what each
model said into ROOT/said.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

QUESTION, CONTEXT = "where did the dog run?", "a red dog ran over the hill, then it slept in the sun"
CHOICES = ["the bird sang", "rain fell on the roof", "they walk to the market and buy bread"]
OUTPUT = [0, 11, 7, 30, 12]
TEXTS = ["the small cat sat under the old tree", "water falls from the mountain", "rain"]


def _pipe(task: str, place: str, code: bool, **keys: Any) -> Any:
    from transformers import pipeline

    return pipeline(task, model=place, device="cpu", trust_remote_code=code, **keys)


def _loaded(auto: str, place: str, code: bool) -> tuple[Any, Any]:
    import transformers

    model = getattr(transformers, auto).from_pretrained(place, trust_remote_code=code).eval()
    return model, transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=code)


def fill(place: str, code: bool) -> tuple[Any, Any]:
    """The likeliest tokens at a mask, with their probabilities."""
    pipe = _pipe("fill-mask", place, code)
    said = pipe(f"the small {pipe.tokenizer.mask_token} sat", top_k=3)
    return pipe.model, [[entry["token"], entry["score"]] for entry in said]


def label(place: str, code: bool) -> tuple[Any, Any]:
    """The score of every label of each text; a batch, padded."""
    pipe = _pipe("text-classification", place, code, batch_size=len(TEXTS))
    return pipe.model, [{entry["label"]: entry["score"] for entry in entries} for entries in pipe(TEXTS, top_k=None)]


def tag(place: str, code: bool) -> tuple[Any, Any]:
    """Label and score of every token."""
    pipe = _pipe("token-classification", place, code, ignore_labels=[])
    return pipe.model, [[entry["index"], entry["entity"], float(entry["score"])] for entry in pipe(TEXTS[0])]


def embed(place: str, code: bool) -> tuple[Any, Any]:
    """The last hidden state of each token."""
    pipe = _pipe("feature-extraction", place, code)
    return pipe.model, pipe(TEXTS[0])


def write_on(place: str, code: bool) -> tuple[Any, Any]:
    """A text continued, the likeliest token each time."""
    pipe = _pipe("text-generation", place, code)
    said = pipe(TEXTS[0], max_new_tokens=6, do_sample=False, return_full_text=False)
    return pipe.model, said[0]["generated_text"]


def answer(place: str, code: bool) -> tuple[Any, Any]:
    """The likeliest span of the context, as text, and the logits of its ends."""
    import torch

    model, tokenizer = _loaded("AutoModelForQuestionAnswering", place, code)
    given = tokenizer(QUESTION, CONTEXT, return_tensors="pt")
    offsets = tokenizer(QUESTION, CONTEXT, return_offsets_mapping=True)["offset_mapping"]
    of_context = torch.tensor([number == 1 for number in given.sequence_ids(0)])
    with torch.no_grad():
        output = model(**given)
    start, end = (logits[0].masked_fill(~of_context, -1e4) for logits in (output.start_logits, output.end_logits))
    sums = (start[:, None] + end[None, :]).masked_fill(torch.ones(len(start), len(end)).tril(-1).bool(), -1e9)
    first, last = divmod(int(sums.argmax()), len(end))
    return model, [CONTEXT[offsets[first][0] : offsets[last][1]], float(sums.max())]


def choose(place: str, code: bool) -> tuple[Any, Any]:
    """The logit of each choice."""
    import torch

    model, tokenizer = _loaded("AutoModelForMultipleChoice", place, code)
    given = tokenizer([TEXTS[0]] * len(CHOICES), CHOICES, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**{name: tensor[None] for name, tensor in given.items()}).logits
    return model, logits[0].tolist()


def translate(place: str, code: bool) -> tuple[Any, Any]:
    """The likeliest output of a beam search, and the logits behind some output."""
    import torch

    model, tokenizer = _loaded("AutoModelForSeq2SeqLM", place, code)
    given = tokenizer(TEXTS[0], return_tensors="pt")
    output = model.generate(given["input_ids"], max_new_tokens=8, num_beams=3)
    with torch.no_grad():
        logits = model(**given, decoder_input_ids=torch.tensor([OUTPUT])).logits
    return model, [output[0].tolist(), logits[0].tolist()]


def stack(place: str, code: bool) -> tuple[Any, Any]:
    """The last hidden state of the stack without its head; other heads can be put on it."""
    import torch

    model, tokenizer = _loaded("AutoModel", place, code)
    other, _ = _loaded("AutoModelForSequenceClassification", place, code)
    assert other.num_labels == 2
    with torch.no_grad():
        return model, model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0].tolist()


FUNCTIONS = (fill, label, tag, embed, write_on, answer, choose, translate, stack)
TASKS = {function.__name__: function for function in FUNCTIONS}


def main(root: Path) -> None:
    """Answer every case."""
    sys.modules["pretrain"] = None  # type: ignore[assignment]  # an import of it fails
    said = {}
    for case in json.loads((root / "cases.json").read_text()):
        try:
            model, answered = TASKS[case["task"]](case["directory"], case["code"])
            said[case["name"]] = {"module": type(model).__module__, "class": type(model).__name__, "said": answered}
        except Exception as error:  # whatever it is, the test of this case tells it
            said[case["name"]] = {"error": repr(error)}
    (root / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
