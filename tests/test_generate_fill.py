"""`generate` and `fill` on model directories: sampling by the rules, gaps filled by the model, errors that help."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pretrain.evaluation.loading import LoadedModel, load_model
from pretrain.export import import_model
from pretrain.fill import fill_masks, show_candidates
from pretrain.generate import generate_text


def draw(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 over bytes with 24 positions; every text decodes exactly."""
    directory = tmp_path_factory.mktemp("decoder")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: number for number, letter in enumerate(letters, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    draw(GPT2LMHeadModel(config)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT over a dozen words and pieces with 16 positions."""
    directory = tmp_path_factory.mktemp("encoder")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names += ["the", "cat", "dog", "sat", "ran", "on", "mat", "##s", "##ing", "."]
    words = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=15,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    draw(BertForMaskedLM(config)).save_pretrained(directory)
    return directory


# --- generate -------------------------------------------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest_token_each_time(decoder: Path) -> None:
    loaded = load_model(decoder, device="cpu")
    text = generate_text(loaded, "ab", max_new_tokens=10, temperature=0)
    assert text.startswith("ab")
    ids = [0, *loaded.tokenizer("ab")["input_ids"]]
    start = len(ids)
    while len(ids) < start + 10 and (ids[-1] != 0 or len(ids) == start):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert text == "ab" + loaded.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_seed_decides_the_sample_and_the_global_state_stays(decoder: Path) -> None:
    loaded = load_model(decoder, device="cpu")
    before = torch.get_rng_state()
    one, same, other = (generate_text(loaded, "a", max_new_tokens=20, temperature=5.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_sampling_is_greedy(decoder: Path, narrow: dict[str, Any]) -> None:
    greedy = generate_text(decoder, "ab", max_new_tokens=8, temperature=0, device="cpu")
    assert generate_text(decoder, "ab", max_new_tokens=8, temperature=3.0, device="cpu", **narrow) == greedy


def test_pieces_add_up_to_the_text(decoder: Path) -> None:
    for seed in range(5):  # random bytes: half characters on the way, held back until they are whole
        pieces: list[str] = []
        text = generate_text(
            decoder, "é", max_new_tokens=20, temperature=9.0, seed=seed, on_text=pieces.append, device="cpu"
        )
        assert "é" + "".join(pieces) == text


def test_no_prompt_starts_at_bos_and_the_length_is_bounded_by_the_positions(decoder: Path) -> None:
    loaded = load_model(decoder, device="cpu")
    text = generate_text(loaded, "", temperature=0)
    assert 0 < len(text) <= 24  # a byte a token, a character at most a byte
    with pytest.raises(ValueError, match="at most 22 new tokens"):
        generate_text(loaded, "ab", max_new_tokens=23)
    with pytest.raises(ValueError, match="shorter prompt"):
        generate_text(loaded, "a" * 30)


def test_generate_refuses_what_it_cannot_do(decoder: Path, encoder: Path) -> None:
    with pytest.raises(ValueError, match="pretrain fill"):
        generate_text(encoder, "the cat", device="cpu")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0, "top_k": 5}, "no effect"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            generate_text(decoder, "ab", device="cpu", **arguments)


# --- fill -----------------------------------------------------------------------------------------------------------


def test_candidates_are_the_models_own_in_order(encoder: Path) -> None:
    loaded = load_model(encoder, device="cpu")
    (candidates,) = fill_masks(loaded, "the [MASK] sat .", top_k=15)
    ids = loaded.tokenizer("the [MASK] sat .", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = loaded.model(ids).logits[0, 2].softmax(-1)
    assert [candidate.token_id for candidate in candidates] == expected.argsort(descending=True).tolist()
    for candidate in candidates:
        assert candidate.probability == pytest.approx(float(expected[candidate.token_id]), rel=1e-5)
        assert candidate.token == loaded.tokenizer.convert_ids_to_tokens(candidate.token_id)
    assert sum(candidate.probability for candidate in candidates) == pytest.approx(1.0, rel=1e-5)
    texts = {candidate.token: candidate.text for candidate in candidates}
    assert texts["cat"] == "the cat sat ."
    assert texts["##s"] == "thes sat ."


def test_every_gap_is_filled_and_every_spelling_taken(encoder: Path) -> None:
    loaded = load_model(encoder, device="cpu")
    first, second = fill_masks(loaded, "the [MASK] sat on the <mask> .", top_k=2)
    assert len(first) == len(second) == 2
    assert first == fill_masks(loaded, "the <mask> sat on the [MASK] .", top_k=2)[0]
    assert first[0].text == f"the {first[0].token} sat on the [MASK] ." or first[0].token.startswith("##")


def test_fill_refuses_what_it_cannot_do(encoder: Path, decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no gap"):
        fill_masks(encoder, "the cat sat .", device="cpu")
    with pytest.raises(ValueError, match="pretrain generate"):
        fill_masks(decoder, "the [MASK] sat .", device="cpu")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        fill_masks(tmp_path, "the [MASK] sat .", device="cpu")
    with pytest.raises(ValueError, match="takes 16"):
        fill_masks(encoder, "the [MASK] sat . " * 8, device="cpu")
    with pytest.raises(ValueError, match="top_k"):
        fill_masks(encoder, "the [MASK]", top_k=0, device="cpu")
    loaded = load_model(encoder, device="cpu")
    loaded.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask_token"):
        fill_masks(LoadedModel(**loaded.__dict__), "the [MASK] sat .")


def test_candidates_are_shown(encoder: Path) -> None:
    sink = io.StringIO()
    show_candidates(fill_masks(encoder, "[MASK] and [MASK]", device="cpu"), Console(file=sink, width=100))
    assert "gap 1 of 2" in sink.getvalue()
    assert "[MASK]" in sink.getvalue()


# --- Loom directories -----------------------------------------------------------------------------------------------

USE = """
import sys
encoder, encoder_loom, decoder, decoder_loom = sys.argv[1:]
from pretrain.fill import fill_masks
stock, loom = (fill_masks(name, "the [MASK] sat .", device="cpu")[0] for name in (encoder, encoder_loom))
assert [each.token for each in stock] == [each.token for each in loom], (stock, loom)
from pretrain.generate import generate_text
stock, loom = (
    generate_text(name, "ab", max_new_tokens=8, temperature=0, device="cpu") for name in (decoder, decoder_loom)
)
assert stock == loom and len(loom) > 2, (stock, loom)
"""


def test_loom_directories_need_no_trust_in_their_code(decoder: Path, encoder: Path, tmp_path: Path) -> None:
    """In a process that imports the two verbs alone; candidates and text are those of the stock directories."""
    loom_encoder, loom_decoder = tmp_path / "encoder", tmp_path / "decoder"
    import_model(encoder, loom_encoder)
    import_model(decoder, loom_decoder)
    for directory, kind, positions in ((loom_encoder, "mlm", 16), (loom_decoder, "causal", 24)):
        assert (directory / "modeling_loom.py").is_file()
        loaded = load_model(directory, device="cpu")
        assert (loaded.kind, loaded.max_positions) == (kind, positions)
        assert type(loaded.model).__module__.startswith("pretrain.models")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(encoder), str(loom_encoder), str(decoder), str(loom_decoder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
