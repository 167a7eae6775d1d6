"""The sections of a card about the model: what it is, how it is loaded, its tokenizer, its shape, its limits.

What lives here: one function a section, `(facts) -> Markdown` without its heading, empty when nothing is known. What
must not: reading. The sections about the run that made it are in `of_run`.
"""

from __future__ import annotations

from typing import Any

from pretrain.cards import of_tuning
from pretrain.cards.citations import own_entry, papers
from pretrain.cards.cost import epochs_of
from pretrain.cards.facts import Facts, Model
from pretrain.cards.loading import auto_class, is_detector, lines_for
from pretrain.cards.places import public
from pretrain.cards.words import cell, code, compact, counted, facts_table, number

_KINDS = {
    "AutoModelForMaskedLM": ("an encoder", "fills masked tokens"),
    "AutoModelForCausalLM": ("a decoder", "goes on with a text"),
    "AutoModelForSeq2SeqLM": ("an encoder-decoder", "turns a text into another"),
    "AutoModelForSequenceClassification": ("a classifier", "labels texts"),
    "AutoModelForTokenClassification": ("a classifier", "labels tokens"),
    "AutoModelForQuestionAnswering": ("a model", "marks answers in a text"),
    "AutoModelForMultipleChoice": ("a model", "chooses between texts"),
}
_DETECTOR = ("an encoder", "detects replaced tokens")
_STACK = ("a stack of layers", "gives a vector for each token")
_TRAINED = {
    "mlm": "masked language modelling",
    "causal": "causal language modelling",
    "rtd": "detection of replaced tokens",
    "span-corruption": "span corruption",
    "translation": "translation",
}
_DTYPES = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16", "I64": "int64", "I32": "int32"}
# What a config calls the numbers of a shape; designs differ in the names.
_SHAPE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layers", ("num_hidden_layers", "n_layer", "encoder_layers", "num_layers")),
    ("layers of the decoder", ("decoder_layers", "num_decoder_layers")),
    ("width", ("hidden_size", "n_embd", "d_model")),
    ("width of the embeddings", ("embedding_size",)),
    ("attention heads", ("num_attention_heads", "n_head", "encoder_attention_heads", "num_heads")),
    ("key-value heads", ("num_key_value_heads",)),
    ("width of a head", ("head_dim", "d_kv")),
    ("width of the MLP", ("intermediate_size", "n_inner", "encoder_ffn_dim", "d_ff")),
    ("activation", ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")),
    ("vocabulary", ("vocab_size",)),
)
_POSITIONS = ("max_position_embeddings", "n_positions")
_MANY_EPOCHS = 4.0
_TOKENS_A_PARAMETER = 20.0


def summary(facts: Facts) -> str:
    """What it is, in a few sentences."""
    kind, does = _kind_of(facts.model) if facts.tuning is None else of_tuning.DOES[facts.tuning.kind]
    size = "" if facts.model.parameters is None else f" of {compact(facts.model.parameters)} parameters"
    form = "Its own modelling code comes with it." if facts.model.needs_code else "No code of its own is needed."
    own = code(facts.model.architecture or "no class named")
    lines = [f"{cell(facts.title)} is {kind}{size} that {does} ({own}). {form}"]
    if facts.model.needs_code:
        lines[0] += " Read that code before `trust_remote_code=True`, as you would read a program."
    if facts.run is not None:
        lines.append(_made_by(facts))
    elif facts.tuning is not None:
        lines.append(of_tuning.summary(facts))
    return "\n\n".join(lines)


def _kind_of(model: Model) -> tuple[str, str]:
    auto = auto_class(model)
    if auto == "AutoModelForPreTraining":
        return _DETECTOR if is_detector(model) else _KINDS["AutoModelForMaskedLM"]
    return _KINDS.get(auto, _STACK)


def _made_by(facts: Facts) -> str:
    assert facts.run is not None
    kind, base = str(facts.objective), facts.run.section("model").get("from")
    trained = _TRAINED.get(kind, f"an objective of its own ({code(kind)})")
    whence = "from random weights" if base is None else f"going on from {code(public(str(base)))}"
    tokens, step = facts.run.progress.get("tokens"), facts.run.progress.get("step")
    seen = "" if tokens is None or step is None else f" on {compact(tokens)} tokens ({counted(step, 'step')})"
    languages = ", ".join(code(language) for language in facts.languages) or "not stated"
    return (
        f"It was pretrained with `pretrain` by {trained}, {whence}{seen}. "
        f"Language of the text: {languages}. Licence of the model: "
        f"{code(facts.license) if facts.license else 'not stated; ask its makers before you use it'}."
    )


def use(facts: Facts) -> str:
    """The lines that load it, to be run as they stand."""
    lines = lines_for(facts.model, facts.place)
    where = "the name of its repository, or its directory"
    return f"Needs {lines.needs} alone; `place` is {where}.\n\n```python\n{lines.code}\n```"


def tokenizer(facts: Facts) -> str:
    """Algorithm, size, special tokens, and what it makes of the text that it was trained on."""
    found, learnt = facts.model.tokenizer, {} if facts.run is None else facts.run.tokenizer
    if found is None:
        return "No `tokenizer.json` lies in the directory." if not facts.model.sentences else ""
    total = learnt.get("total") or {}
    settings = {} if facts.run is None else facts.run.section("tokenizer")
    rows: dict[str, Any] = {
        "algorithm": cell(found.algorithm),
        "pieces": number(found.size),
        "learnt from": _corpus(learnt) or _elsewhere(settings, facts),
        "special tokens": ", ".join(f"{cell(role)} {code(text)}" for role, text in found.specials.items()) or None,
        "normalization": ", ".join(map(cell, found.normalizer)) or "none",
        "cut before learning by": ", ".join(map(cell, found.pre_tokenizer)) or None,
    }
    if total.get("tokens"):
        rows["UTF-8 bytes a token"] = number(total["bytes"] / total["tokens"])
        rows["tokens a word"] = number(total["tokens"] / total["words"]) if total.get("words") else None
        rows["unknown tokens"] = f"{total.get('unknown', 0) / total['tokens']:.4%}"
        if total.get("lines"):
            rows["lines that decode to themselves"] = f"{total['exact_lines'] / total['lines']:.2%}"
    return facts_table(rows)


def _corpus(learnt: Any) -> str | None:
    corpus = learnt.get("corpus") or {}
    if not corpus.get("bytes"):
        return None
    sample = corpus.get("sample_bytes")
    part = "" if not sample or sample >= corpus["bytes"] else f", {number(sample)} of them drawn"
    return f"{counted(corpus.get('documents', 0), 'document')}, {number(corpus['bytes'])} bytes{part}"


def _elsewhere(settings: Any, facts: Facts) -> str | None:
    assert facts.run is not None or not settings
    base = settings.get("from") or (facts.run.section("model").get("from") if facts.run is not None else None)
    if base is None:
        return None
    more = f", and up to {number(settings['extend'])} further pieces learnt" if settings.get("extend") else ""
    return f"taken from {code(public(str(base)))}{more}"


def architecture(facts: Facts) -> str:
    """The class, its sizes, its context."""
    model = facts.model
    rows: dict[str, Any] = {
        "class": code(model.architecture or "not named"),
        "`model_type`": code(model.config.get("model_type", "not named")),
        "parameters": "unknown" if model.parameters is None else number(model.parameters),
        "stored as": ", ".join(_DTYPES.get(dtype, dtype) for dtype in model.dtypes) or None,
    }
    rows |= {label: _first(model, keys) for label, keys in _SHAPE}
    rows["context"] = _context(facts)
    if model.generator is not None:
        size = model.generator.parameters
        rows["generator, in a folder of its own"] = "unknown" if size is None else f"{number(size)} parameters"
    return facts_table(rows)


def _first(model: Model, keys: tuple[str, ...]) -> str | None:
    found = next((model.config[key] for key in keys if model.config.get(key) is not None), None)
    return None if found is None else number(found)


def _context(facts: Facts) -> str | None:
    """Positions that it can hold, and those that it was trained on."""
    holds = next((facts.model.config[key] for key in _POSITIONS if facts.model.config.get(key)), None)
    trained = None if facts.run is None else facts.run.section("data").get("sequence_length")
    said = [f"{number(holds)} positions"] if holds else []
    if trained:
        said.append(f"trained on rows of {number(trained)}")
    return ", ".join(said) or None


def limits(facts: Facts) -> str:
    """What it cannot be expected to do, as far as its making tells."""
    auto, found = auto_class(facts.model), list[str]()
    pretrained = auto in ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForPreTraining")
    if auto == "AutoModelForCausalLM" and facts.objective in (None, "causal"):
        made = "goes on with a text" if facts.run is not None else "goes on with a text, as far as its class tells"
        found.append(f"It {made}. Nothing in its making taught it to follow instructions, to refuse, or to be true.")
    elif pretrained or facts.objective in ("mlm", "rtd", "span-corruption"):
        found.append("It is a pretrained model: for a task of your own, fine-tune it on examples of that task.")
    if context := _context(facts):
        found.append(f"Context: {context}. Longer texts must be cut, or lose what lies beyond.")
    if facts.run is not None:
        found += _limits_of_run(facts)
    else:
        found.append("What text it was trained on, and how, is not known to this card.")
    found.append("It can repeat what its text says, false, private and offensive parts too.")
    return "\n".join(f"- {line}" for line in found)


def _limits_of_run(facts: Facts) -> list[str]:
    assert facts.run is not None
    run, found = facts.run, list[str]()
    languages = ", ".join(code(language) for language in facts.languages)
    of_text = f"its text is in {languages}" if languages else "the language of its text is not stated"
    found.append(f"Language: {of_text}; other languages cannot be expected to work.")
    tokens, parameters = run.progress.get("tokens"), facts.model.parameters
    if tokens and parameters and tokens < _TOKENS_A_PARAMETER * parameters and run.section("model").get("from") is None:
        found.append(
            f"Little training: {tokens / parameters:.2g} tokens a parameter, where about {_TOKENS_A_PARAMETER:g} make "
            "the most of the arithmetic (Hoffmann et al. 2022, for decoders)."
        )
    if many := [f"{count:.1f} times" for count in epochs_of(run).values() if count > _MANY_EPOCHS]:
        found.append(
            f"Repeated text: read up to {max(many, key=lambda text: float(text.split()[0]))}; past about "
            f"{_MANY_EPOCHS:g} repetition teaches little (Muennighoff et al. 2023)."
        )
    data = run.made_from or run.section("data")
    if data and not data.get("decontaminate"):
        found.append("Its text was not compared with benchmarks: scores on public tests may be flattered.")
    if data and not data.get("filters"):
        found.append("No filter of quality or of content was applied to its text.")
    return found


def citation(facts: Facts) -> str:
    """BibTeX of the model and of what it follows."""
    entries = [own_entry(facts), *(paper.bibtex() for paper in papers(facts))]
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"
