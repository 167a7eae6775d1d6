"""Generation of the encoder-decoder: caches, beams, sampling, padded batches; what is captured; saving and resizing."""

from __future__ import annotations

import json

import pytest
import torch
from loom_builders import relative, tokens
from safetensors import safe_open
from seq2seq_builders import VARIANTS, seq2seq_model
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from pretrain.models import LoomSeq2SeqForConditionalGeneration, LoomSeq2SeqModel

STYLES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "length_penalty": 0.6},
    "sampling": {"do_sample": True, "top_k": 0},
}


def generate(model, inputs, **keys):
    torch.manual_seed(0)
    keys = {"max_new_tokens": 6, "eos_token_id": 4, "pad_token_id": 0} | keys
    return model.generate(inputs, **keys)


@pytest.mark.parametrize(("variant", "style"), [("transformer", "beams"), ("t5-1.1", "greedy"), ("t5-1.1", "sampling")])
def test_the_cache_changes_nothing(variant: str, style: str) -> None:
    model = seq2seq_model(variant)
    inputs, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, 7:] = 0
    keys = STYLES[style] | {"attention_mask": mask, "output_scores": True, "return_dict_in_generate": True}
    cached, plain = (generate(model, inputs, use_cache=use_cache, **keys) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.past_key_values is not None
    for step, (first, second) in enumerate(zip(cached.scores, plain.scores, strict=True)):
        open_ = torch.isfinite(second)
        assert torch.equal(open_, torch.isfinite(first)), step
        assert relative(first[open_], second[open_]) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_with_a_cache_equal_the_whole_output_at_once(variant: str) -> None:
    """One token, then three, then one at a time; the input is encoded once."""
    model = seq2seq_model(variant)
    inputs, outputs = tokens(2, 9), tokens(2, 8, seed=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    with torch.no_grad():
        whole = model(input_ids=inputs, attention_mask=mask, decoder_input_ids=outputs).logits
        encoded = model.get_encoder()(input_ids=inputs, attention_mask=mask)
        past, made = None, []
        for start, stop in ((0, 1), (1, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
            step = model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=outputs[:, start:stop],
                past_key_values=past,
                use_cache=True,
            )
            past = step.past_key_values
            made.append(step.logits)
        tupled = model(encoder_outputs=(encoded[0],), attention_mask=mask, decoder_input_ids=outputs).logits
    assert relative(torch.cat(made, dim=1), whole) < 1e-5
    assert torch.equal(tupled, whole)
    assert past.get_seq_length() == 8
    assert past.cross_attention_cache.layers[0].keys.shape[2] == 9


@pytest.mark.parametrize(("variant", "style"), [("transformer", "greedy"), ("t5-1.1", "beams")])
def test_a_static_cache_generates_the_same(variant: str, style: str) -> None:
    model = seq2seq_model(variant)
    inputs, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    keys = STYLES[style] | {"attention_mask": mask}
    static = generate(model, inputs, cache_implementation="static", **keys)
    assert torch.equal(static, generate(model, inputs, **keys))


@pytest.mark.parametrize(("variant", "style"), [("transformer", "beams"), ("t5", "greedy")])
def test_a_padded_batch_generates_what_each_input_generates_alone(variant: str, style: str) -> None:
    model = seq2seq_model(variant)
    lengths = (4, 9, 7)
    sources = [tokens(1, length, seed=length)[0] for length in lengths]
    alone = [generate(model, source[None], **STYLES[style])[0] for source in sources]
    for side in ("right", "left"):
        inputs, mask = tokens(3, 9, seed=9), torch.zeros(3, 9, dtype=torch.long)
        for row, source in enumerate(sources):
            place = slice(0, len(source)) if side == "right" else slice(9 - len(source), 9)
            inputs[row, place], mask[row, place] = source, 1
        keys = {"attention_mask": mask}
        if side == "left" and variant == "transformer":  # its positions count from the first token
            keys["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        made = generate(model, inputs, **STYLES[style], **keys)
        for row, expected in zip(made, alone, strict=True):
            assert row[: len(expected)].tolist() == expected.tolist()
            assert (row[len(expected) :] == 0).all()


def test_sampling_follows_the_seed_and_beams_find_a_likelier_output() -> None:
    model = seq2seq_model()
    inputs = tokens(2, 9)
    sampled = [generate(model, inputs, **STYLES["sampling"]) for _ in range(2)]
    assert torch.equal(*sampled)
    torch.manual_seed(1)
    assert not torch.equal(model.generate(inputs, do_sample=True, max_new_tokens=6, eos_token_id=4), sampled[0])

    def likelihood(row: int, output: torch.Tensor) -> float:
        logits = model(input_ids=inputs[row : row + 1], decoder_input_ids=output[None, :-1]).logits
        return float(logits.log_softmax(-1).gather(2, output[None, 1:, None]).sum())

    greedy = generate(model, inputs, eos_token_id=None)
    beams = generate(model, inputs, eos_token_id=None, num_beams=4)
    with torch.no_grad():
        for row in range(2):
            assert likelihood(row, beams[row]) >= likelihood(row, greedy[row]) - 1e-4


def test_generation_takes_what_the_encoder_made() -> None:
    model = seq2seq_model()
    inputs, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=inputs, attention_mask=mask)
    expected = generate(model, inputs, attention_mask=mask, num_beams=3)
    given = generate(model, None, encoder_outputs=encoded, attention_mask=mask, num_beams=3)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attentions_and_hidden_states_are_those_of_the_layers(variant: str) -> None:
    """Counts and shapes; the last of each against the model's own output; probabilities against a sum by hand."""
    model = seq2seq_model(variant)
    inputs, outputs = tokens(2, 7), tokens(2, 5, seed=1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    keys = {"input_ids": inputs, "attention_mask": mask, "decoder_input_ids": outputs}
    with torch.no_grad():
        plain = model(**keys)
        output = model(output_attentions=True, output_hidden_states=True, **keys)
    encoder, decoder = model.model.encoder, model.model.decoder
    assert relative(output.logits, plain.logits) < 1e-5
    assert plain.decoder_attentions is plain.cross_attentions is plain.encoder_attentions is None
    assert [len(output[name]) for name in ("encoder_attentions", "decoder_attentions", "cross_attentions")] == [
        len(encoder.layers),
        len(decoder.layers),
        len(decoder.layers),
    ]
    assert len(output.encoder_hidden_states) == len(encoder.layers) + 1
    assert len(output.decoder_hidden_states) == len(decoder.layers) + 1
    assert {tuple(weights.shape) for weights in output.encoder_attentions} == {(2, 4, 7, 7)}
    assert {tuple(weights.shape) for weights in output.decoder_attentions} == {(2, 4, 5, 5)}
    assert {tuple(weights.shape) for weights in output.cross_attentions} == {(2, 4, 5, 7)}
    for weights in (*output.encoder_attentions, *output.decoder_attentions, *output.cross_attentions):
        assert torch.allclose(weights.sum(-1), torch.ones(()))
    assert float(output.decoder_attentions[0].triu(1).abs().max()) == 0
    assert float(output.cross_attentions[-1][1, ..., 4:].abs().max()) == 0
    assert relative(output.encoder_hidden_states[-1], plain.encoder_last_hidden_state) < 1e-5
    hidden = output.decoder_hidden_states[-1] * model.config.output_scale
    assert relative(model.lm_head(hidden), plain.logits) < 1e-5

    layer = decoder.layers[0]  # its cross-attention by hand
    states = output.decoder_hidden_states[0]
    with torch.no_grad():
        normed = layer.attention_norm(states) if layer.pre_norm else states
        own = (output.decoder_attentions[0] @ heads(layer.self_attn.v_proj(normed))).transpose(1, 2).flatten(2)
        states = states + layer.self_attn.o_proj(own)
        states = layer.cross_attention_norm(states) if layer.pre_norm else layer.attention_norm(states)
        query = heads(layer.cross_attn.q_proj(states))
        key = heads(layer.cross_attn.k_proj(output.encoder_last_hidden_state))
        scores = query @ key.transpose(2, 3) * layer.cross_attn.scaling
        scores[1, ..., 4:] = -torch.inf
    assert relative(output.cross_attentions[0], scores.softmax(-1)) < 1e-5


def heads(states):
    return states.unflatten(-1, (4, -1)).transpose(1, 2)


def test_generation_hands_out_attentions_of_all_three_kinds() -> None:
    model = seq2seq_model()
    made = generate(
        model,
        tokens(2, 7),
        eos_token_id=None,
        output_attentions=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert len(made.encoder_attentions) == 2
    assert len(made.cross_attentions) == len(made.decoder_attentions) == len(made.decoder_hidden_states) == 6
    assert made.cross_attentions[5][1].shape == (2, 4, 1, 7)
    assert made.decoder_attentions[5][1].shape == (2, 4, 1, 6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_in_shards_with_tied_tensors_once(variant: str, tmp_path) -> None:
    model = seq2seq_model(variant)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) == (not model.config.tie_word_embeddings)
    assert "model.encoder.embed_tokens.weight" in names
    loaded, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, LoomSeq2SeqForConditionalGeneration)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    inputs, outputs = tokens(2, 6), tokens(2, 5)
    with torch.no_grad():
        expected = model(input_ids=inputs, decoder_input_ids=outputs)
        assert torch.equal(loaded(input_ids=inputs, decoder_input_ids=outputs).logits, expected.logits)
        bare = AutoModel.from_pretrained(tmp_path)
        assert isinstance(bare, LoomSeq2SeqModel)
        states = bare(input_ids=inputs, decoder_input_ids=outputs)
    assert torch.equal(states.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "loom_seq2seq"
    assert config["is_encoder_decoder"] is True
    assert AutoConfig.from_pretrained(tmp_path).num_decoder_layers == model.config.num_decoder_layers


@pytest.mark.parametrize("variant", ["transformer", "t5-1.1"])
def test_resizing_keeps_the_old_rows_and_the_tie(variant: str) -> None:
    model = seq2seq_model(variant)
    inputs, labels = tokens(2, 6), tokens(2, 5)
    with torch.no_grad():
        expected = model(input_ids=inputs, labels=labels).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == 70
    assert model.model.encoder.embed_tokens.weight.shape == model.lm_head.weight.shape == (70, 24)
    tied = model.lm_head.weight is model.model.encoder.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    with torch.no_grad():
        assert relative(model(input_ids=inputs, labels=labels).logits[..., :61], expected) < 1e-6
    assert model(input_ids=inputs, labels=labels + 9).logits.shape == (2, 5, 70)
    model.train()
    model(input_ids=inputs, labels=labels + 9).loss.backward()
    assert model.lm_head.weight.grad[61:].abs().sum() > 0
    model.eval()
    assert generate(model, inputs).shape[0] == 2
