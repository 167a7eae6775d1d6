"""The encoder-decoder equals references in float64, and keeps padding, pieces and splits of a batch apart."""

from __future__ import annotations

import pytest
import reference_seq2seq as reference
import torch
from loom_builders import documents, relative, tokens
from seq2seq_builders import VARIANTS, seq2seq_config, seq2seq_model

from pretrain.models import LoomSeq2SeqForConditionalGeneration, LoomSeq2SeqModel


def expected_logits(variant: str, model, weights, source: list[int], target: list[int]):
    config = model.config
    sizes = {
        "layers": config.num_hidden_layers,
        "decoder_layers": config.num_decoder_layers,
        "heads": config.num_attention_heads,
        "eps": config.norm_eps,
    }
    if variant.startswith("t5"):
        return reference.t5(
            weights,
            source,
            target,
            buckets=config.relative_attention_num_buckets,
            furthest=config.relative_attention_max_distance,
            gated=variant == "t5-1.1",
            tied=variant == "t5",
            **sizes,
        )
    return reference.transformer(
        weights,
        source,
        target,
        interleaved="interleaved" in variant,
        scaled="unscaled" not in variant,
        post_norm="pre-norm" not in variant,
        **sizes,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_all_gradients_equal_the_reference(variant: str) -> None:
    """Two rows of different lengths, padded; the loss smoothed as in the paper."""
    smoothing = 0.1
    model = seq2seq_model(variant, label_smoothing=smoothing).double().train()
    sources = [tokens(1, length, seed=length)[0].tolist() for length in (11, 6)]
    targets = [tokens(1, length, seed=length)[0].tolist() for length in (5, 10)]
    inputs = torch.zeros(2, 11, dtype=torch.long)
    labels = torch.full((2, 10), -100)
    for row in range(2):
        inputs[row, : len(sources[row])] = torch.tensor(sources[row])
        labels[row, : len(targets[row])] = torch.tensor(targets[row])
    mask = (inputs != 0).long()

    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    expected = []
    for source, target in zip(sources, targets, strict=True):
        expected.append(expected_logits(variant, model, weights, source, [0, *target[:-1]]))
        total = total + reference.smoothed_loss(expected[-1], target, smoothing)
    loss = total / 15
    loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items()}

    for attention, fused in (("eager", False), ("sdpa", False), ("sdpa", True)):
        model.set_attn_implementation(attention)
        model.zero_grad()
        output = model(input_ids=inputs, attention_mask=mask, labels=labels, return_logits=not fused)
        assert (output.logits is None) == fused
        for row, logits in enumerate([] if fused else expected):
            assert relative(output.logits[row, : len(logits)], logits) < 1e-9
        assert relative(output.loss, loss) < 1e-9
        output.loss.backward()
        assert_gradients_equal(model, gradients, 1e-9)


def assert_gradients_equal(model, expected, tolerance: float) -> None:
    """Relative to the largest of each parameter; a key's bias, of which softmax takes no notice, has rounding alone."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        size = max(float(expected[name].abs().max()), 1e-5 * largest)
        assert float((parameter.grad - expected[name]).abs().max()) / size < tolerance, name


def test_the_loss_is_not_smoothed_while_evaluating_and_is_divided_by_the_given_count() -> None:
    model = seq2seq_model(label_smoothing=0.2).requires_grad_(False)
    inputs, labels = tokens(2, 7), tokens(2, 6, seed=1)
    labels[0, 4:] = -100
    output = model(input_ids=inputs, labels=labels)
    plain = sum(
        float(reference.smoothed_loss(logits[:count].double(), wanted[:count].tolist(), 0.0))
        for logits, wanted, count in zip(output.logits, labels, (4, 6), strict=True)
    )
    assert float(output.loss.detach()) == pytest.approx(plain / 10, rel=1e-5)
    assert float(model(input_ids=inputs, labels=labels, num_items_in_batch=40).loss) == pytest.approx(plain / 40)
    model.train()
    assert float(model(input_ids=inputs, labels=labels, num_items_in_batch=40).loss) > plain / 40


@pytest.mark.parametrize("distance", range(-140, 141, 7))
def test_relative_buckets_equal_the_reference(distance: int) -> None:
    from pretrain.models.positions import relative_buckets

    for both_sides in (True, False):
        for buckets, furthest in ((32, 128), (8, 9), (16, 64)):
            wanted = reference.t5_bucket(distance, both_sides=both_sides, buckets=buckets, furthest=furthest)
            made = relative_buckets(
                torch.tensor([distance]), both_sides=both_sides, num_buckets=buckets, max_distance=furthest
            )
            assert int(made) == wanted


def test_the_decoder_is_given_the_labels_one_place_later() -> None:
    model = seq2seq_model(decoder_start_token_id=3, pad_token_id=1)
    labels = torch.tensor([[7, 8, 9], [5, -100, -100]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[3, 7, 8], [3, 5, 1]]
    inputs = tokens(2, 6)
    given = model(input_ids=inputs, decoder_input_ids=shifted).logits
    assert torch.equal(model(input_ids=inputs, labels=labels).logits, given)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id is not set"):
        model(input_ids=inputs, labels=labels)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(input_ids=inputs)


def test_embeddings_may_be_given_in_place_of_ids() -> None:
    model = seq2seq_model()
    inputs, outputs = tokens(2, 6), tokens(2, 5, seed=1)
    look_up = model.get_input_embeddings()
    expected = model(input_ids=inputs, decoder_input_ids=outputs).logits
    given = model(inputs_embeds=look_up(inputs), decoder_inputs_embeds=look_up(outputs)).logits
    assert torch.equal(given, expected)


# Two pairs in each row, the second of another length of input and output, then padding.
INPUT_PIECES, OUTPUT_PIECES = ([6, 9, -3], [11, 4, -3]), ([5, 8, -2], [3, 10, -2])


def packed_batch():
    inputs, outputs = tokens(2, 18, seed=3), tokens(2, 15, seed=4)
    return inputs, outputs, documents(*INPUT_PIECES), documents(*OUTPUT_PIECES)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_padded_equals_alone(variant: str, attention: str) -> None:
    model = seq2seq_model(variant, attention=attention)
    inputs, outputs, pieces, output_pieces = packed_batch()
    filled, mask = tokens(4, 12, seed=5), torch.zeros(4, 12, dtype=torch.long)
    output_filled, output_mask = tokens(4, 11, seed=6), torch.zeros(4, 11, dtype=torch.long)
    with torch.no_grad():
        packed = model(
            input_ids=inputs, decoder_input_ids=outputs, document_ids=pieces, decoder_document_ids=output_pieces
        ).logits
        alone = []
        for row, piece in ((0, 1), (0, 2), (1, 1), (1, 2)):
            source, target = inputs[row, pieces[row] == piece], outputs[row, output_pieces[row] == piece]
            filled[len(alone), : len(source)], mask[len(alone), : len(source)] = source, 1
            output_filled[len(alone), : len(target)], output_mask[len(alone), : len(target)] = target, 1
            alone.append(model(input_ids=source[None], decoder_input_ids=target[None]).logits[0])
            assert relative(packed[row, output_pieces[row] == piece], alone[-1]) < 1e-5
        for more in ({}, {"decoder_attention_mask": output_mask}):
            padded = model(input_ids=filled, attention_mask=mask, decoder_input_ids=output_filled, **more).logits
            for logits, expected in zip(padded, alone, strict=True):
                assert relative(logits[: len(expected)], expected) < 1e-5


@pytest.mark.parametrize("variant", ["transformer", "t5"])
def test_inputs_padded_on_the_left_equal_the_input_alone(variant: str) -> None:
    """Positions that count from the first token are given; relative ones need none."""
    model = seq2seq_model(variant)
    source, target = tokens(1, 7, seed=5), tokens(1, 5, seed=6)
    padded = torch.cat((tokens(1, 4, seed=7), source), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    positions = (mask.cumsum(1) - 1).clamp(min=0) if variant == "transformer" else None
    with torch.no_grad():
        alone = model(input_ids=source, decoder_input_ids=target).logits
        left = model(input_ids=padded, attention_mask=mask, position_ids=positions, decoder_input_ids=target).logits
    assert relative(left, alone) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["transformer", "t5"])
def test_no_gradient_reaches_a_neighbour_padding_or_the_future(variant: str, attention: str) -> None:
    model = seq2seq_model(variant, attention=attention)
    inputs, outputs, pieces, output_pieces = packed_batch()
    source = model.model.encoder.embed_tokens(inputs).detach().requires_grad_()
    target = model.model.encoder.embed_tokens(outputs).detach().requires_grad_()
    logits = model(
        inputs_embeds=source, decoder_inputs_embeds=target, document_ids=pieces, decoder_document_ids=output_pieces
    ).logits
    place = 5 + 2  # the third position of the second piece of row 0
    logits[0, place].square().sum().backward()
    input_reached = source.grad.abs().sum(-1) > 0
    output_reached = target.grad.abs().sum(-1) > 0
    assert input_reached[0].tolist() == (pieces[0] == 2).tolist()
    assert output_reached[0].tolist() == [5 <= index <= place for index in range(15)]
    assert not input_reached[1].any()
    assert not output_reached[1].any()

    source.grad = target.grad = None
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[0, 12:] = 0
    model(inputs_embeds=source, decoder_inputs_embeds=target, attention_mask=mask).logits[0].square().sum().backward()
    assert (source.grad[0].abs().sum(-1) > 0).tolist() == (mask[0] == 1).tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["transformer", "t5"])
def test_rows_of_padding_alone_give_no_nan_and_no_gradient(variant: str, attention: str) -> None:
    model = seq2seq_model(variant, attention=attention).double().train()
    inputs, labels = tokens(2, 8), tokens(2, 6, seed=1)
    labels[1] = -100
    for masks in (
        {"attention_mask": torch.tensor([[1] * 8, [0] * 8])},
        {
            "attention_mask": torch.tensor([[1] * 8, [0] * 8]),
            "decoder_attention_mask": torch.tensor([[1] * 6, [0] * 6]),
        },
        {"document_ids": documents([8], [-8]), "decoder_document_ids": documents([6], [-6])},
    ):
        gradients = {}
        for rows in (1, 2):
            model.zero_grad()
            parts = {name: mask[:rows] for name, mask in masks.items()}
            output = model(input_ids=inputs[:rows], labels=labels[:rows], return_logits=True, **parts)
            assert torch.isfinite(output.logits).all()
            output.loss.backward()
            if rows == 1:
                gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        assert_gradients_equal(model, gradients, 1e-9)


def test_masks_of_every_type_and_none_mean_the_same() -> None:
    model = seq2seq_model()
    inputs, outputs = tokens(2, 6), tokens(2, 5, seed=1)
    with torch.no_grad():
        none = model(input_ids=inputs, decoder_input_ids=outputs).logits
        for dtype in (torch.long, torch.bool, torch.int32, torch.float32):
            ones = model(
                input_ids=inputs,
                attention_mask=torch.ones(2, 6, dtype=dtype),
                decoder_input_ids=outputs,
                decoder_attention_mask=torch.ones(2, 5, dtype=dtype),
            ).logits
            assert torch.equal(ones, none)


def test_documents_of_input_and_output_come_together_and_masks_must_fit() -> None:
    model = seq2seq_model()
    inputs, outputs = tokens(1, 6), tokens(1, 5)
    with pytest.raises(ValueError, match="document_ids and decoder_document_ids"):
        model(input_ids=inputs, decoder_input_ids=outputs, document_ids=documents([3, 3]))
    with pytest.raises(ValueError, match=r"expected \(rows, 6\)"):
        model(encoder_outputs=(torch.zeros(1, 6, 24),), attention_mask=torch.ones(1, 7), decoder_input_ids=outputs)


def test_keyed_dropout_is_the_same_in_any_split_and_differs_between_branches() -> None:
    from pretrain.models.dropout import CROSS_SITES, DECODER_SITES, branch_sites, keyed_mask

    keys = {"hidden_dropout": 0.3, "embedding_dropout": 0.2}
    model = seq2seq_model("transformer", **keys).train()
    inputs, labels = tokens(4, 9), tokens(4, 9, seed=1)
    row_keys = torch.tensor([11, 12, 2**60, -7])
    with torch.no_grad():
        whole = model(input_ids=inputs, labels=labels, dropout_keys=row_keys, return_logits=True).logits
        parts = [
            model(input_ids=inputs[rows], labels=labels[rows], dropout_keys=row_keys[rows], return_logits=True).logits
            for rows in ([0, 1], [2], [3])
        ]
        other = model(input_ids=inputs, labels=labels, dropout_keys=row_keys + 1, return_logits=True).logits
    assert relative(torch.cat(parts), whole) < 1e-6
    assert relative(other, whole) > 1e-2
    sites = [site for start in (0, DECODER_SITES) for site in (start, *(start + s for s in branch_sites(0)))]
    masks = [keyed_mask(row_keys[:1], site, 0.5, 9, 24) for site in (*sites, CROSS_SITES)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks) == 7


def test_the_three_branches_of_the_decoder_and_the_encoder_drop_out_apart() -> None:
    """What each call of dropout is given: every site of the model once, none twice."""
    from unittest.mock import patch

    from pretrain.models import dropout as dropout_module
    from pretrain.models import layers, modeling_loom

    seen: list[int] = []

    def recording(states, probability, keys, site):
        seen.append(site)
        return dropout_module.dropout(states, probability, keys, site)

    model = seq2seq_model("transformer", hidden_dropout=0.3, embedding_dropout=0.2).train()
    with patch.object(layers, "dropout", recording), patch.object(modeling_loom, "dropout", recording):
        model(input_ids=tokens(1, 4), labels=tokens(1, 4), dropout_keys=torch.tensor([5]))
    # embeddings, and two branches of two layers; embeddings, and three branches of two layers
    assert len(seen) == (1 + 2 * 2) + (1 + 3 * 2)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("variant", ["transformer", "t5"])
def test_gradient_checkpointing_changes_nothing(variant: str) -> None:
    model = seq2seq_model(variant, hidden_dropout=0.2).train()
    inputs, labels, keys = tokens(2, 9), tokens(2, 7, seed=1), torch.tensor([5, 6])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.model.encoder.gradient_checkpointing
            assert model.model.decoder.gradient_checkpointing
        model.zero_grad()
        model(input_ids=inputs, labels=labels, dropout_keys=keys).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_bare_model_and_the_config() -> None:
    bare = LoomSeq2SeqModel(seq2seq_config("t5-1.1"))
    output = bare(input_ids=tokens(2, 6), decoder_input_ids=tokens(2, 5))
    assert output.last_hidden_state.shape == (2, 5, 24)
    assert output.encoder_last_hidden_state.shape == (2, 6, 24)
    assert len(bare.encoder.layers) == 2
    assert len(bare.decoder.layers) == 3
    assert not any("decoder.embed_tokens" in name for name, _ in bare.named_parameters())
    for key, value in (
        ("num_hidden_groups", 1),
        ("block_kind", "parallel"),
        ("first_norm", False),
        ("num_decoder_layers", 0),
        ("label_smoothing", 1.0),
        ("decoder_start_token_id", 61),
    ):
        extra = {"norm_placement": "pre"} if key == "block_kind" else {}
        with pytest.raises(ValueError, match=key):
            seq2seq_config("t5", **{key: value}, **extra)
    model = LoomSeq2SeqForConditionalGeneration(seq2seq_config("transformer"))
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight
