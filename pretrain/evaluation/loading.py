"""Any Hugging Face model directory, made ready for scoring: the model, its tokenizer, and what exactly they are.

What lives here: the one loader that `evaluate`, `generate` and `fill` share, and what every loader says when there is
nothing to load. What must not: writing directories, or a choice of class; a directory is loaded by plain
`transformers`, as its users load it. The Loom classes are known to it, so their directories need no code of their own.

Weights come from safetensors alone, and code inside a directory runs only when the caller asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

import pretrain.models  # noqa: F401 (registers the Loom classes with the Auto classes)
from pretrain.evaluation.passes import bare
from pretrain.files import ArtifactError, sha256_file
from pretrain.trust import check_model, check_tokenizer

Kind = Literal["causal", "mlm", "seq2seq", "vectors"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model")
_OWN_CODE = "it carries its own code: read it, then allow it with --trust-remote-code"
_AUTO_CLASSES: dict[Kind, Any] = {
    "causal": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
_UNLIMITED = 1_000_000  # tokenizers without a stated limit carry 1e30


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer, in evaluation mode on `device`.

    `kind` is "causal" (predicts the next token), "mlm" (fills masks), "seq2seq" (an encoder-decoder: predicts an
    output from an input) or "vectors" (loaded without a head); `source` is the directory or Hub name as given.
    """

    model: Any
    tokenizer: Any
    kind: Kind
    source: str
    tokenizer_source: str
    device: torch.device

    @property
    def max_positions(self) -> int | None:
        """The longest input, in tokens, that model and tokenizer state; None when neither states one."""
        positions = usable_positions(self.model)
        limits = [] if positions is None else [positions]
        if 0 < self.tokenizer.model_max_length < _UNLIMITED:
            limits.append(int(self.tokenizer.model_max_length))
        return min(limits) if limits else None


def usable_positions(model: Any) -> int | None:
    """The longest input, in tokens, that a model's positions hold; None when it states no limit.

    RoBERTa and its kin start counting after the padding id: the positions up to it are never used.
    """
    own: Any = bare(model)
    positions = getattr(own.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in own.named_modules():
        if name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            return positions - int(module.padding_idx) - 1
    return positions


def load_model(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    kind: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    head: bool = True,
) -> LoadedModel:
    """Load a model directory (or a Hub name) and its tokenizer, weights in fp32, in evaluation mode.

    Args:
        source: a directory with `config.json`, safetensors and a tokenizer, or a Hub name.
        tokenizer: where the tokenizer lies, when it is not in `source`.
        kind: "causal", "mlm", "seq2seq", or "auto": by the class that `config.json` names.
        device: "cpu", "cuda", ...; default: CUDA where there is one.
        trust_remote_code: run the code that the directory carries.
        head: load the language-model head; without it any model of text will do, and its kind is "vectors".

    Raises:
        ValueError: when there is no such model, when it has no language-model head of the asked kind, when its
            weights are not safetensors, or when the tokenizer is missing; names the remedy.
    """
    name = str(source)
    config = _config(name, kind, trust_remote_code)
    decided: Kind = "vectors"
    if head:
        decided = _kind_of(config, name) if kind == "auto" else cast(Kind, kind)
    auto_class = _AUTO_CLASSES[decided] if head else AutoModel
    with loading(name, "model"):
        model, report = auto_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    # A pooler, which some classes add beside the last hidden states, is nowhere looked at.
    if missing := sorted(key for key in report["missing_keys"] if head or "pooler" not in key):
        generator = Path(name) / "generator"  # of a detector of replaced tokens
        hint = f": `{generator}`" if (generator / "config.json").is_file() else ""
        raise ValueError(
            f"`{name}` has no weights for `{missing[0]}` of {type(model).__name__}: it was saved without that head; "
            f"give a directory that was saved with its language-model head{hint}"
        )
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer_source = str(tokenizer) if tokenizer is not None else name
    loaded_tokenizer = _load_tokenizer(tokenizer_source, trust_remote_code)
    if len(loaded_tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"the tokenizer of `{tokenizer_source}` has {len(loaded_tokenizer):,} ids, the model `{name}` embeds "
            f"{model.get_input_embeddings().num_embeddings:,}; give the tokenizer that the model was trained with"
        )
    return LoadedModel(model.eval().to(place), loaded_tokenizer, decided, name, tokenizer_source, place)


def kind_of_model(source: str | Path, kind: str = "auto", *, trust_remote_code: bool = False) -> Kind:
    """What `load_model` would take a model for, from its config.json alone.

    Raises:
        ValueError: as `load_model` does.
    """
    config = _config(str(source), kind, trust_remote_code)
    return _kind_of(config, str(source)) if kind == "auto" else cast(Kind, kind)


def _config(name: str, kind: str, trust_remote_code: bool) -> Any:
    if kind not in ("auto", *_AUTO_CLASSES):
        raise ValueError(f"kind: {kind} is unknown; use auto, {', '.join(_AUTO_CLASSES)}")
    check_source(name)
    with loading(name, "model"):
        check_model(name, trust_remote_code=trust_remote_code)
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def check_source(source: str | Path) -> None:
    """A path that is no model directory gets its answer here; else it would be taken for a Hub name.

    Raises:
        ArtifactError: says what is there instead, and the remedy.
    """
    name, path = str(source), Path(source)
    if path.is_file():
        raise ArtifactError(f"`{name}` is a file; give the directory that holds config.json and the weights")
    if path.is_dir() and not (path / "config.json").is_file():
        inside = next((folder for folder in ("model", "export") if (path / folder / "config.json").is_file()), None)
        hint = f"did you mean `{path / inside}`?" if inside else "give a directory that save_pretrained or export wrote"
        raise ArtifactError(f"`{name}` is not a model directory: config.json is missing; {hint}")
    if not path.exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ArtifactError(f"there is no directory `{name}`; give a model directory or a Hub name")


@contextmanager
def loading(name: str, what: str, *, own_code: str = _OWN_CODE) -> Iterator[None]:
    """Say what could not be loaded and what to do; no progress bars and weight reports of `transformers` meanwhile.

    Raises:
        ValueError: in place of what `transformers` raises; `own_code` is the remedy for a model that carries its code.
    """
    console: Any = logging
    were_shown, verbosity = console.is_progress_bar_enabled(), console.get_verbosity()
    console.disable_progress_bar()
    console.set_verbosity_error()
    try:
        yield
    except ArtifactError:  # says what to do already
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            remedy = own_code
        elif Path(name).is_dir():
            remedy = (
                "give a directory with config.json, *.safetensors (pickled .bin files are not read) and a tokenizer"
            )
        else:
            remedy = (
                "there is no such directory, so it is a name on the Hub; give a Hub name that can be reached from here "
                "(see HF_HUB_OFFLINE, HF_TOKEN), or download it elsewhere and give the directory"
            )
        raise ValueError(f"`{name}`: the {what} cannot be loaded; {remedy} ({reason[:300]})") from error
    finally:
        console.set_verbosity(verbosity)
        if were_shown:
            console.enable_progress_bar()


def _load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(
            f"`{name}` holds no tokenizer (tokenizer.json is missing); name its directory with --tokenizer"
        )
    with loading(name, "tokenizer"):
        check_tokenizer(name, trust_remote_code=trust_remote_code)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def _kind_of(config: Any, name: str) -> Kind:
    """By the class that saved the weights; BERT, for one, has a class of either kind."""
    saved_by = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if saved_by.endswith("ForMaskedLM") or (masked and saved_by.endswith("ForPreTraining")):
        return "mlm"
    if saved_by.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if masked != causal:
        return "mlm" if masked else "causal"
    raise ValueError(
        f"`{name}` ({saved_by or config.model_type}) names no language-model head; "
        "say which one with --kind: causal or mlm"
    )


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """What was scored: class, parameters, and the SHA-256 of config and weights (of a Hub model: its commit)."""
    path = Path(loaded.source)
    facts: dict[str, Any] = {
        "source": loaded.source,
        "class": type(loaded.model).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
    }
    if path.is_dir():
        files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
        facts["sha256"] = {file.name: sha256_file(file) for file in files}
    else:
        facts["commit"] = getattr(loaded.model.config, "_commit_hash", None)
    return facts


def describe_tokenizer(loaded: LoadedModel) -> dict[str, Any]:
    """Which tokenizer it was: ids in all, and the SHA-256 of its files (of a Hub name: the name alone)."""
    path = Path(loaded.tokenizer_source)
    facts: dict[str, Any] = {"source": loaded.tokenizer_source, "vocab_size": len(loaded.tokenizer)}
    if path.is_dir():
        files = [path / file for file in _TOKENIZER_FILES if (path / file).is_file()]
        facts["sha256"] = {file.name: sha256_file(file) for file in files}
    return facts
