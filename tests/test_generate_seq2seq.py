"""`generate` and its neighbours on an encoder-decoder directory: outputs for inputs, and errors that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.evaluate import evaluate_model
from pretrain.evaluation.likelihood import evaluate_batches
from pretrain.evaluation.loading import load_model
from pretrain.fill import fill_masks
from pretrain.generate import generate_text
from pretrain.model_dir import write_model
from pretrain.models import loom_config, model_from_config


def write_tokenizer(directory: Path, *, closes: bool = False) -> None:
    """Bytes behind <pad> = 0 and <end> = 1; `closes` puts <end> behind each text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<end>": 1} | {letter: number for number, letter in enumerate(letters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if closes:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Marian and a T5 over bytes as `export` writes them, and a Loom directory with code of the package."""
    made: dict[str, Path] = {}
    for name, architecture, keys in (
        ("marian", "transformer", {}),
        ("t5", "t5", {"head_dim": 8}),
        ("loom", "transformer", {"norm_placement": "pre"}),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = model_from_config(loom_config(architecture, **sizes, max_position_embeddings=24, **keys))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.4, generator=generator)
        if name == "loom":
            model.save_pretrained(made[name])
        else:
            write_model(model, made[name])
        write_tokenizer(made[name], closes=name == "t5")
    return made


@pytest.mark.parametrize("name", ["marian", "t5", "loom"])
def test_the_default_is_the_likeliest_token_of_the_output_for_the_input_and_its_end(name: str, directories) -> None:
    loaded = load_model(directories[name], device="cpu")
    assert loaded.kind == "seq2seq"
    text = generate_text(loaded, "ab cd", max_new_tokens=8)
    inputs = torch.tensor([[*loaded.tokenizer("ab cd", add_special_tokens=False)["input_ids"], 1]])
    made = [0]
    while len(made) < 9 and (made[-1] != 1 or len(made) == 1):
        with torch.no_grad():
            made.append(
                int(loaded.model(input_ids=inputs, decoder_input_ids=torch.tensor([made])).logits[0, -1].argmax())
            )
    assert text == loaded.tokenizer.decode(made, skip_special_tokens=True)
    assert text == generate_text(directories[name], "ab cd", max_new_tokens=8, temperature=0, device="cpu")


def test_beams_samples_and_pieces(directories) -> None:
    loaded = load_model(directories["marian"], device="cpu")
    inputs = torch.tensor([[*loaded.tokenizer("hello")["input_ids"], 1]])
    expected = loaded.model.generate(inputs, num_beams=4, max_new_tokens=10)[0]
    for options in ({}, {"temperature": 0.0}):
        pieces: list[str] = []
        text = generate_text(loaded, "hello", num_beams=4, max_new_tokens=10, on_text=pieces.append, **options)
        assert text == loaded.tokenizer.decode(expected, skip_special_tokens=True)
        assert pieces == [text]
    one, same, other = (generate_text(loaded, "a", max_new_tokens=20, temperature=5.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert generate_text(loaded, "a", top_k=1, max_new_tokens=9) == generate_text(loaded, "a", max_new_tokens=9)
    pieces = []
    text = generate_text(loaded, "a", max_new_tokens=9, temperature=3.0, on_text=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_what_the_directory_says_of_outputs_holds(directories, tmp_path: Path) -> None:
    for file in directories["t5"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "generation_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"num_beams": 3, "forced_bos_token_id": 70}))
    loaded = load_model(tmp_path, device="cpu")
    text = generate_text(loaded, "ab", max_new_tokens=6)
    inputs = torch.tensor([loaded.tokenizer("ab")["input_ids"]])
    expected = loaded.model.generate(inputs, num_beams=3, forced_bos_token_id=70, max_new_tokens=6)[0]
    assert text == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert text.startswith(loaded.tokenizer.decode([70]))
    for name in ("config.json", "generation_config.json"):
        facts = json.loads((tmp_path / name).read_text())
        facts.pop("decoder_start_token_id")
        (tmp_path / name).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="decoder_start_token_id is not set"):
        generate_text(tmp_path, "ab", device="cpu")


def test_refusals_name_the_remedy(directories, tmp_path: Path) -> None:
    loaded = load_model(directories["marian"], device="cpu")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("", {}, "the input is empty"),
        ("a" * 30, {}, r"an input of 31 tokens does not fit the 24 positions .* shorter text"),
        ("a", {"max_new_tokens": 25}, "max_new_tokens may be 24 at most"),
        ("a", {"num_beams": 0}, "num_beams: 0 must be at least 1"),
        ("a", {"num_beams": 3, "temperature": 0.5}, "temperature samples; remove one"),
        ("a", {"num_beams": 3, "top_k": 5}, "top_k samples; remove one"),
    ]
    for text, options, message in cases:
        with pytest.raises(ValueError, match=message):
            generate_text(loaded, text, **options)
    with pytest.raises(ValueError, match="is an encoder-decoder; let it answer an input with `pretrain generate`"):
        fill_masks(loaded, "a [MASK]")
    text = tmp_path / "text.txt"
    text.write_text("some words\n")
    with pytest.raises(ValueError, match="is an encoder-decoder, which predicts an output from an input"):
        evaluate_model(directories["t5"], [str(text)], device="cpu")


def test_from_the_command_line(directories) -> None:
    arguments = ["generate", str(directories["marian"]), "hello", "--max-new-tokens", "7", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--num-beams", "2"])
    assert done.exit_code == 0, done.output
    expected = generate_text(directories["marian"], "hello", max_new_tokens=7, num_beams=2, device="cpu")
    assert done.stdout == expected + "\n"


def test_prepared_pairs_are_scored(directories) -> None:
    """Batches as the data plane makes them, on our class: the mean loss of the targets."""
    model = load_model(directories["loom"], device="cpu").model
    generator = torch.Generator().manual_seed(3)
    arrays = {
        "input_ids": torch.randint(2, 258, (2, 9), generator=generator),
        "decoder_input_ids": torch.randint(2, 258, (2, 7), generator=generator),
        "document_ids": torch.tensor([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2]),
        "decoder_document_ids": torch.tensor([[1] * 5 + [2] * 2, [1] * 4 + [0] * 3]),
        "labels": torch.randint(2, 258, (2, 7), generator=generator),
    }
    arrays["labels"][1, 4:] = -100
    with torch.no_grad():
        output = model(**arrays)
    scores = evaluate_batches(model, [{name: array.numpy() for name, array in arrays.items()}], device="cpu")
    assert scores["num_targets"] == 11
    assert scores["loss"] == pytest.approx(float(output.loss), rel=1e-5)
