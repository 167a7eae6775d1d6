"""Model directories: export and import by the command, sharding, dtypes, proofs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

from pretrain.evaluation.loading import load_model
from pretrain.export import export_model, import_model
from pretrain.files import ArtifactError, write_manifest
from pretrain.model_dir import write_model
from pretrain.model_reading import read_detector, read_loom, read_state
from pretrain.models import loom_config, model_class, model_from_config
from pretrain.published_store import PublishedStore
from pretrain.training.checkpoint import verify_model
from pretrain.training.snapshots import share_out

DECODERS = ("gpt2", "llama", "qwen3", "modernbert-decoder")
ARCHITECTURES = ("bert", "roberta", "electra", "albert", "modernbert", "eurobert", *DECODERS)


def drawn(architecture: str) -> Any:
    """A tiny model with every parameter drawn, norms and biases too."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    if architecture == "albert":
        sizes["embedding_size"] = 16
    if architecture == "qwen3":
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    return randomized(model_from_config(loom_config(architecture, **sizes, max_position_embeddings=64)))


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_export_then_import(architecture: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = drawn(architecture)
    write_model(model, source)
    proof = export_model(source, tmp_path / "out", max_shard_bytes=20_000)
    assert proof.difference <= 1e-5
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_state(tmp_path / "out"))
    auto = AutoModelForCausalLM if architecture in DECODERS else AutoModelForMaskedLM
    stock, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert stock.config.model_type == architecture
    assert import_model(tmp_path / "out", tmp_path / "loom").difference <= 1e-5
    config = json.loads((tmp_path / "loom" / "config.json").read_text())
    assert config["model_type"].startswith("loom")
    assert "AutoModel" in str(config["auto_map"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_store_reads_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    model = drawn(architecture)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    digests = PublishedStore().write(model, weights, tmp_path)
    assert set(digests) == {path.name for path in tmp_path.iterdir()}
    read = PublishedStore().read(model_from_config(model.config), tmp_path)
    assert set(read) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shares_of_a_model_are_one_model_directory(architecture: str, tmp_path: Path) -> None:
    """Three processes, each without the data of the others; what the stock form joins lies with one of them."""
    model, store = drawn(architecture), PublishedStore()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    joined = store.together(model, sizes)
    assert sorted(name for names in joined for name in names) == sorted(weights)
    shares = share_out(sizes, sizes, joined, 3).weights
    digests: dict[str, str] = {}
    for number, names in enumerate(shares):
        own = {name: tensor if name in names else tensor.to("meta") for name, tensor in weights.items()}
        digests |= store.write_share(model, own, tmp_path, shares, number)
    assert set(digests) == {path.name for path in tmp_path.iterdir()}
    bytes_of = [(tmp_path / f"model-0000{number}-of-00003.safetensors").stat().st_size for number in (1, 2, 3)]
    assert max(bytes_of) < 0.9 * sum(bytes_of)
    read = store.read(model_from_config(model.config), tmp_path)
    for name, tensor in weights.items():
        assert torch.equal(read[name], tensor), name
    auto = AutoModelForCausalLM if architecture in DECODERS else AutoModelForMaskedLM
    _, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("sharing", ["tied", "gradient_disentangled", "none"])
def test_a_checkpoint_holds_a_detector_with_its_generator_and_an_export_the_detector(
    sharing: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = loom_config("electra", **sizes, embedding_size=16, max_position_embeddings=64, intermediate_size=40)
    config.generator_size, config.rtd_sharing = 0.5, sharing
    model = randomized(model_class(config, "replaced_token_detection")(config))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    checkpoint, store = tmp_path / "checkpoint", PublishedStore()
    checkpoint.mkdir()
    store.write(model, weights, checkpoint)
    read = store.read(model, checkpoint)
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    if sharing == "gradient_disentangled":  # one process writes what is added up
        assert ["embedding_delta.weight", "generator.model.embed_tokens.weight"] in map(
            sorted, store.together(model, weights)
        )
    stock, report = AutoModelForPreTraining.from_pretrained(checkpoint, output_loading_info=True)
    assert type(stock).__name__ == "ElectraForPreTraining"
    assert not report["missing_keys"]
    assert all(name.startswith(("generator.", "embedding_delta.")) for name in report["unexpected_keys"])
    ids = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        assert torch.allclose(stock.eval()(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    assert export_model(checkpoint, tmp_path / "out").difference <= 1e-5
    assert {name.split(".")[0] for name in read_state(tmp_path / "out")} == {"electra", "discriminator_predictions"}
    made, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "generator", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        expected = model.generator(input_ids=ids).logits
        assert torch.allclose(made.eval()(input_ids=ids).logits, expected, atol=1e-5 * float(expected.abs().max()))

    whole, beside = read_detector(checkpoint), read_detector(tmp_path / "out")  # to go on from either of them
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name
        assert torch.allclose(beside.state_dict()[name], tensor, rtol=0, atol=1e-6), name
    assert whole.config.rtd_sharing == beside.config.rtd_sharing == sharing
    with pytest.raises(ValueError, match="has a generator, so `generator`, which shapes a new one"):
        read_detector(checkpoint, keys={"generator_size": 0.5, "generator": {}})
    assert read_detector(tmp_path / "out", keys={"rtd_weight": 9.0}).config.rtd_weight == 9.0
    if sharing != "gradient_disentangled":
        return
    export_model(tmp_path / "out", tmp_path / "again")  # both parts, bit for bit
    assert import_model(tmp_path / "again", tmp_path / "loom").difference <= 1e-5
    for folder in (".", "generator"):
        first, second = (read_state(tmp_path / place / folder) for place in ("out", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
        assert json.loads((tmp_path / "loom" / folder / "config.json").read_text())["model_type"] == "loom_encoder"


def test_what_no_detector_can_go_on_from(tmp_path: Path) -> None:
    config = loom_config("electra", vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for name, model in (
        ("alone", randomized(model_class(config, "replaced_token_detection")(config))),
        ("tokens", drawn("electra")),
        ("bert", drawn("bert")),
    ):
        (tmp_path / name).mkdir()
        write_model(model, tmp_path / name)
    told: list[str] = []
    model: Any = read_detector(tmp_path / "alone", note=told.append, keys={"generator_size": 0.5})
    assert model.generator.config.hidden_size == 16
    assert "has no generator" in told[0]
    with pytest.raises(ArtifactError, match=r"ElectraForMaskedLM\) has no head that detects replaced tokens"):
        read_detector(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"is a bert model, which has no class for .* give a model of electra"):
        read_detector(tmp_path / "bert")
    (tmp_path / "tokens").rename(tmp_path / "alone" / "generator")
    with pytest.raises(ArtifactError, match=r"no language-model head: .* or take its generator, `.*generator`"):
        read_loom(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"its language-model head: `.*generator`"):
        load_model(tmp_path / "alone")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_proved_against_the_rounded_weights(dtype: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_model(drawn("llama"), source)
    assert export_model(source, tmp_path / "out", dtype=dtype).difference <= 1e-5
    kinds = {tensor.dtype for tensor in read_state(tmp_path / "out").values()}
    assert kinds == {torch.bfloat16 if dtype == "bf16" else torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(kinds.pop()).split(".")[1]


def test_only_a_checkpoints_model_has_digests_to_compare(tmp_path: Path) -> None:
    """Every file of the model counts, whatever name a checkpoint was copied to; other directories are as before."""
    home = tmp_path / "step-00000010"
    (home / "model").mkdir(parents=True)
    write_model(drawn("gpt2"), home / "model")
    export_model(home, tmp_path / "without-manifest")
    write_manifest(home, kind="checkpoint", config={})
    export_model(home, tmp_path / "whole")
    with (home / "model" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=r"config\.json` was altered.*copy it out"):
        export_model(home, tmp_path / "altered")
    (home / "model" / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json` is missing"):
        verify_model(home / "model")
    copied = home.rename(tmp_path / "copied")
    verify_model(copied / "model")  # anything may hold a folder `model` and a `manifest.json`
    (copied / "trainer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json` is missing"):
        verify_model(copied / "model")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run, checkpoint or model directory"):
        export_model(tmp_path, tmp_path / "out")
    source = tmp_path / "source"
    source.mkdir()
    write_model(drawn("gpt2"), source)
    with pytest.raises(ValueError, match="dtype: int8 is unknown; use one of fp32, bf16, fp16"):
        export_model(source, tmp_path / "out", dtype="int8")
    export_model(source, tmp_path / "out")
    with pytest.raises(ArtifactError, match="exists already"):
        export_model(source, tmp_path / "out")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="pickled weights are not read"):
        read_loom(source)


def test_a_wrong_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export whose logits differ is not published."""
    import pretrain.export as verb

    source = tmp_path / "source"
    source.mkdir()
    write_model(drawn("gpt2"), source)
    read = verb.read_stock

    def altered(directory: Path, **keys: Any) -> Any:
        model = read(directory, **keys)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.bias[0] += 0.5
        return model

    monkeypatch.setattr(verb, "read_stock", altered)
    with pytest.raises(ArtifactError, match="the logits differ"):
        export_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
