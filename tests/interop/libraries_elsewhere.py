"""Run by `test_ecosystem_fresh.py` in a process that cannot import `pretrain`: libraries that take a model directory.

Usage: python libraries_elsewhere.py ROOT. Reads ROOT/cases.json, a list of {name, library, directory, code}; writes
what each said, a list of numbers, into ROOT/said.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = ["the small cat sat under the old tree", "a red dog ran over the hill", "rain fell", "they buy bread"]
_TRAINED = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "max_length": 32,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def _loaded(auto: str, place: str, code: bool, **keys: Any) -> tuple[Any, Any]:
    import transformers

    model = getattr(transformers, auto).from_pretrained(place, trust_remote_code=code, **keys).eval()
    return model, transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=code)


def sentences(place: str, code: bool) -> list[float]:
    """The vector of a text."""
    from sentence_transformers import SentenceTransformer

    keys = {"trust_remote_code": True} if code else {}
    found: list[float] = SentenceTransformer(place, device="cpu", **keys).encode(TEXTS)[0].tolist()
    return found


def adapters(place: str, code: bool) -> list[float]:
    """Losses of a classifier whose adapters are trained."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, tokenizer = _loaded("AutoModelForSequenceClassification", place, code)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**given, labels=torch.tensor([0, 1, 0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def _log(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(place: str, code: bool) -> list[float]:
    """Losses of supervised fine-tuning."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = _loaded("AutoModelForCausalLM", place, code)
    data = Dataset.from_dict({"text": TEXTS})
    arguments = SFTConfig(f"{place}-sft", **_TRAINED)
    return _log(SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer))


def dpo(place: str, code: bool) -> list[float]:
    """Losses of direct preference optimization; the first one is log 2, as both models are the same then."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = _loaded("AutoModelForCausalLM", place, code)
    reference, _ = _loaded("AutoModelForCausalLM", place, code)
    pairs = {"prompt": ["the small"] * 4, "chosen": [" cat sat"] * 4, "rejected": [" dog ran"] * 4}
    arguments = DPOConfig(f"{place}-dpo", **_TRAINED)
    data = Dataset.from_dict(pairs)
    return _log(DPOTrainer(model, reference, arguments, train_dataset=data, processing_class=tokenizer))


def onnx(place: str, code: bool) -> list[float]:
    """The largest difference of ONNX Runtime's logits, over the largest logit."""
    import onnxruntime
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model, tokenizer = _loaded("AutoModelForMaskedLM", place, code)
    given = dict(tokenizer(TEXTS[:2], padding=True, return_tensors="pt"))
    OnnxExporter().export(model, given, OnnxConfig(dynamic=True)).save_pretrained(f"{place}-onnx")
    session = onnxruntime.InferenceSession(f"{place}-onnx/model.onnx", providers=["CPUExecutionProvider"])
    given = dict(tokenizer(TEXTS[2:], padding=True, return_tensors="pt"))
    (said,) = session.run(["logits"], {entry.name: given[entry.name].numpy() for entry in session.get_inputs()})
    with torch.no_grad():
        expected = model(**given).logits
    difference = (torch.tensor(said) - expected)[given["attention_mask"].bool()].abs().max() / expected.abs().max()
    return [float(difference)]


def harness(place: str, code: bool) -> list[float]:
    """Bits per byte by lm-eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root = Path(f"{place}-task")
    root.mkdir()
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (root / "task.yaml").write_text(
        "task: bits\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {root / 'rows.jsonl'}}}}}\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n"
    )
    model = HFLM(pretrained=place, device="cpu", dtype="float32", trust_remote_code=code, add_bos_token=False)
    manager = TaskManager(include_path=str(root), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=["bits"], task_manager=manager, bootstrap_iters=0)
    return [found["results"]["bits"]["bits_per_byte,none"]]


LIBRARIES = {function.__name__: function for function in (sentences, adapters, sft, dpo, onnx, harness)}


def main(root: Path) -> None:
    """Answer every case."""
    sys.modules["pretrain"] = None  # type: ignore[assignment]  # an import of it fails
    said: dict[str, Any] = {}
    for case in json.loads((root / "cases.json").read_text()):
        try:
            said[case["name"]] = LIBRARIES[case["library"]](case["directory"], case["code"])
        except Exception as error:  # whatever it is, the test of this case tells it
            said[case["name"]] = repr(error)
    (root / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
