"""Detection of replaced tokens: the loss written out, draws, sharing, splits of a batch, both published parts.

Formulas are in float64 on logits of the two stacks, which have their own tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from loom_builders import documents, randomize, relative, tiny_config, tokens
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification

from pretrain.interop import rules_to_stock, to_stock
from pretrain.models import (
    GENERATOR_SIZE,
    LoomEncoderForMaskedLM,
    LoomEncoderForReplacedTokenDetection,
    flops_per_token,
    join_parts,
    loom_config,
    model_class,
    model_from_config,
    modeling_loom_rtd,
    num_multiplied_parameters,
    register_hub_code,
    wants_dropout_keys,
)
from pretrain.models.dropout import SAMPLING_SITE, place_words
from pretrain.models.modeling_loom_rtd import draw_tokens

SHARINGS = ["tied", "gradient_disentangled", "none"]
KEYS = torch.tensor([5, -(2**62), 77, 2**60 + 1])


def detector(architecture: str = "electra", sharing: str = "tied", **keys: Any) -> Any:
    keys = {"num_hidden_layers": 2, "generator_size": 0.5, "rtd_sharing": sharing} | keys
    model = LoomEncoderForReplacedTokenDetection(tiny_config(architecture, **keys))
    randomize(model)
    return model.double().train()


def rows(count: int = 4, length: int = 12, padding: int = 3) -> dict[str, Tensor]:
    """Masked rows, the last of them shorter."""
    original = tokens(count, length)
    mask = torch.ones(count, length, dtype=torch.long)
    mask[-1, length - padding :] = 0
    chosen = (torch.rand(count, length, generator=torch.Generator().manual_seed(3)) < 0.3) & (mask == 1)
    return {
        "input_ids": original.masked_fill(chosen, 4) * mask,
        "attention_mask": mask,
        "labels": torch.where(chosen, original, -100),
    }


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("architecture", ["electra", "modernbert", "albert"])
def test_the_loss_is_that_of_the_paper(architecture: str, sharing: str) -> None:
    """Mean cross-entropy of masked tokens + 50 times mean binary cross-entropy of all tokens but padding."""
    model, batch = detector(architecture, sharing), rows()
    output = model(**batch, dropout_keys=KEYS)
    labels, real = batch["labels"], batch["attention_mask"] == 1
    masked = labels != -100
    original = torch.where(masked, labels, batch["input_ids"])
    corrupted = output.corrupted_ids
    assert torch.equal(corrupted[~masked], original[~masked])  # special tokens and padding among them
    assert torch.equal(output.is_replaced, corrupted != original)
    assert 0 < int(output.is_replaced.sum()) <= int(masked.sum())

    given = {"attention_mask": batch["attention_mask"]}
    scores = model.generator.eval()(input_ids=batch["input_ids"], **given).logits[masked]
    of_generator = -scores.log_softmax(-1).gather(1, labels[masked][:, None]).mean()
    if sharing == "gradient_disentangled":
        table = model.generator.model.embed_tokens.weight + model.embedding_delta.weight
        states = model.model(inputs_embeds=table[corrupted], **given)
    else:
        states = model.model(input_ids=corrupted, **given)
    head = model.rtd_head
    dense = states.last_hidden_state @ head.dense.weight.T + head.dense.bias
    act = functional.gelu(dense, approximate="tanh" if architecture == "albert" else "none")
    logits = (act @ head.out.weight.T + head.out.bias)[..., 0]
    assert relative(output.logits, logits) < 1e-10
    sign = torch.where(output.is_replaced, 1.0, -1.0).double()
    of_discriminator = torch.log1p(torch.exp(-sign * logits))[real].mean()
    assert output.generator_loss.item() == pytest.approx(of_generator.item(), rel=1e-9)
    assert output.discriminator_loss.item() == pytest.approx(of_discriminator.item(), rel=1e-9)
    assert output.loss.item() == pytest.approx((of_generator + 50 * of_discriminator).item(), rel=1e-9)
    right = ((logits > 0) == output.is_replaced)[real].double().mean()
    parts = {name: (pair[0] / pair[1]).item() for name, pair in output.parts.items()}
    assert parts["accuracy"] == pytest.approx(right.item())
    assert parts["generator_loss"] == pytest.approx(of_generator.item(), rel=1e-9)
    assert parts["discriminator_loss"] == pytest.approx(of_discriminator.item(), rel=1e-9)
    assert parts["replaced"] == pytest.approx(int(output.is_replaced.sum()) / int(real.sum()))
    found = ((logits > 0) & output.is_replaced & real).sum().double()
    assert parts["detection_precision"] == pytest.approx((found / ((logits > 0) & real).sum()).item(), nan_ok=True)
    assert parts["detection_recall"] == pytest.approx((found / output.is_replaced.sum()).item())
    assert not any(pair.requires_grad for pair in output.parts.values())


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyed", [True, False])
def test_tokens_are_drawn_by_their_probabilities(keyed: bool) -> None:
    """Over 60,000 places within 5 deviations of the softmax, and places and rows draw on their own."""
    count, length = 300, 200
    logits = torch.tensor([2.0, 0.0, -1.0, 1.5, -6.0, 0.5, -30.0]).expand(count * length, -1)
    torch.manual_seed(1)
    keys = torch.randint(-(2**63), 2**63 - 1, (count,))
    words = place_words(keys, SAMPLING_SITE, length, torch.arange(count * length)) if keyed else None
    drawn = draw_tokens(logits, words)
    wanted = logits[0].double().softmax(-1)
    found = torch.bincount(drawn, minlength=7) / len(drawn)
    deviation = (wanted * (1 - wanted) / len(drawn)).sqrt() + 1e-9
    assert ((found - wanted) / deviation).abs().max() < 5
    table = (drawn == 0).double().view(count, length) - wanted[0]
    for shifted in (table[:, 1:] * table[:, :-1], table[1:] * table[:-1], table[:, 8:] * table[:, :-8]):
        assert abs(shifted.sum() / (wanted[0] * (1 - wanted[0]) * shifted.numel() ** 0.5)) < 5


def test_draws_are_a_function_of_key_place_and_logits() -> None:
    model, batch = detector(), rows()
    state = torch.get_rng_state()
    whole = model(**batch, dropout_keys=KEYS).corrupted_ids
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for size in (1, 3):
        parts = [
            model(
                **{name: value[start : start + size] for name, value in batch.items()},
                dropout_keys=KEYS[start : start + size],
            ).corrupted_ids
            for start in range(0, 4, size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    wider = {name: functional.pad(value, (0, 2)) for name, value in batch.items()}
    wider["labels"][:, 12:] = -100
    assert torch.equal(model(**wider, dropout_keys=KEYS).corrupted_ids[:, :12], whole)
    other = model(**batch, dropout_keys=KEYS + 1).corrupted_ids
    assert not torch.equal(other, whole)
    torch.manual_seed(0)
    assert not torch.equal(model(**batch).corrupted_ids, model(**batch).corrupted_ids)


def test_a_draw_that_hits_the_original_counts_as_original() -> None:
    model, batch = detector(), rows()
    model.generator.lm_head.bias.data.zero_()
    model.generator.lm_head.bias.data[9] = 1e4
    batch["labels"][batch["labels"] != -100] = 9
    output = model(**batch, dropout_keys=KEYS)
    assert bool((output.corrupted_ids[batch["labels"] != -100] == 9).all())
    assert not output.is_replaced.any()


def test_evaluation_gives_one_number() -> None:
    """Without keys, evaluation draws by the tokens of a row: not by chance, nor by padding."""
    model, batch = detector().eval(), rows()
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.loss, second.loss)
    last = {name: value[3:, :9] for name, value in batch.items()}
    assert torch.equal(model(**last).corrupted_ids, first.corrupted_ids[3:, :9])
    assert not torch.equal(first.corrupted_ids, batch["input_ids"])


# --- splits of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
def test_micro_batches_add_up(sharing: str) -> None:
    model, batch = detector(sharing=sharing, hidden_dropout=0.2, embedding_dropout=0.1), rows()
    counts = {"tokens": int(batch["attention_mask"].sum())}
    targets = int((batch["labels"] != -100).sum())
    whole = model(**batch, dropout_keys=KEYS).loss
    wanted = gradients(model, whole)
    model.zero_grad()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        given = {name: value[part] for name, value in batch.items()}
        loss = model(**given, dropout_keys=KEYS[part], num_items_in_batch=targets, item_counts=counts).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-9), name


def test_recomputed_layers_give_equal_gradients() -> None:
    model, batch = detector(hidden_dropout=0.2), rows()
    plain = gradients(model, model(**batch, dropout_keys=KEYS).loss)
    calls: list[int] = []
    for stack in (model.model, model.generator.model):
        stack.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    again = gradients(model, model(**batch, dropout_keys=KEYS).loss)
    assert len(calls) == 4
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("architecture", ["electra", "modernbert"])
def test_packed_rows_are_rows_alone(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With draws that do not know their place."""
    monkeypatch.setattr(modeling_loom_rtd, "draw_tokens", lambda logits, words: logits.argmax(-1))
    model = detector(architecture).eval()
    original, chosen = tokens(1, 14), torch.rand(1, 14, generator=torch.Generator().manual_seed(1)) < 0.4
    chosen[:, 12:] = False
    masked, labels = original.masked_fill(chosen, 4), torch.where(chosen, original, -100)
    packed = model(input_ids=masked, labels=labels, document_ids=documents([7, 5, -2]))
    counts = {"num_items_in_batch": int(chosen.sum()), "item_counts": {"tokens": 12}}
    total = 0.0
    for part in (slice(0, 7), slice(7, 12)):
        alone = model(input_ids=masked[:, part], labels=labels[:, part], **counts)
        assert relative(packed.logits[:, part], alone.logits) < 1e-9
        assert torch.equal(packed.corrupted_ids[:, part], alone.corrupted_ids)
        total += alone.loss.item()
    assert packed.loss.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_no_targets_and_no_tokens_give_numbers(sharing: str) -> None:
    model, batch = detector(sharing=sharing), rows()
    batch["labels"].fill_(-100)
    output = model(**batch, dropout_keys=KEYS)
    assert output.generator_loss.item() == 0.0
    assert not output.is_replaced.any()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, output.loss).values())
    packed = {"input_ids": batch["input_ids"], "labels": batch["labels"], "document_ids": torch.zeros(4, 12).int()}
    assert model(**packed, dropout_keys=KEYS).loss.item() == 0.0  # what an idle process is given
    batch["attention_mask"].zero_()
    output = model(**batch, dropout_keys=KEYS)
    assert output.loss.item() == 0.0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, output.loss).values())


# --- sharing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
def test_which_loss_moves_which_table(sharing: str) -> None:
    model, batch = detector(sharing=sharing), rows()
    output = model(**batch, dropout_keys=KEYS)
    moved = {}
    for name in ("generator_loss", "discriminator_loss"):
        output = model(**batch, dropout_keys=KEYS)
        made = gradients(model, getattr(output, name))
        moved[name] = {key for key, gradient in made.items() if gradient.abs().max() > 0}
    theirs, ours = moved["generator_loss"], moved["discriminator_loss"]
    stack = {name for name, _ in model.named_parameters() if name.startswith(("generator.", "embedding_delta"))}
    if sharing == "tied":
        assert "model.embed_tokens.weight" in theirs & ours
        assert "model.embed_positions.weight" in theirs & ours
        assert not ours & stack
        assert model.generator.model.embed_tokens.weight is model.model.embed_tokens.weight
        assert model.generator.lm_head.weight is model.model.embed_tokens.weight
    elif sharing == "gradient_disentangled":
        assert ours & stack == {"embedding_delta.weight"}
        assert "generator.model.embed_tokens.weight" in theirs
        assert "embedding_delta.weight" not in theirs
    else:
        assert not ours & stack
        assert not theirs - stack


SHARED = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def stock_pair(model: Any) -> tuple[Any, Any]:
    """transformers' own classes with both parts of a detector; a table in each, though they share it."""
    of_discriminator = to_stock(model.discriminator_config(), model.discriminator_state())
    of_generator = to_stock(model.generator.config, model.generator_state())
    made = []
    for found, (config, state) in (
        (transformers.ElectraForPreTraining, of_discriminator),
        (transformers.ElectraForMaskedLM, of_generator),
    ):
        stock = found(config)
        assert not stock.load_state_dict(state, strict=False).unexpected_keys
        stock.tie_weights()
        stock.electra.embeddings.word_embeddings.padding_idx = None  # a generator draws every token, padding too
        made.append(stock.double().train())
    return made[0], made[1]


def stock_losses(discriminator: Any, generator: Any, batch: dict[str, Tensor], drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Of the generator and of the discriminator, without our code."""
    masked, mask = batch["labels"] != -100, batch["attention_mask"]
    original = torch.where(masked, batch["labels"], batch["input_ids"])
    corrupted = original.masked_scatter(masked, drawn)
    given = {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": batch["labels"]}
    logits = discriminator(input_ids=corrupted, attention_mask=mask).logits[mask == 1]
    wanted = (corrupted != original)[mask == 1].double()
    return generator(**given).loss, functional.binary_cross_entropy_with_logits(logits, wanted)


def test_a_shared_table_moves_by_the_sum_of_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' two classes with a table each: its gradient is the generator's plus 50 discriminator's."""
    model, batch = detector(embedding_size=16), rows()
    drawn = torch.randint(0, 61, (int((batch["labels"] != -100).sum()),), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(modeling_loom_rtd, "draw_tokens", lambda logits, words: drawn)
    ours = gradients(model, model(**batch).loss)
    discriminator, generator = stock_pair(model)
    of_generator, of_discriminator = stock_losses(discriminator, generator, batch, drawn)
    of_generator.backward()
    of_discriminator.backward()
    names = {"word_embeddings": "tokens", "position_embeddings": "positions", "token_type_embeddings": "token_types"}
    for name, own in names.items():
        first, second = (getattr(part.electra.embeddings, name).weight.grad for part in (generator, discriminator))
        assert relative(ours[f"model.embed_{own}.weight"], first + 50 * second) < 1e-12
        assert relative(first, first + 50 * second) > 1e-3  # each of them is seen
    _, rules = rules_to_stock(model.discriminator_config(), model.discriminator_state())
    theirs = dict(discriminator.named_parameters())
    for rule in rules:
        if ".embeddings." not in rule.stock:
            own = rule.join([ours[name] for name in rule.loom])
            assert torch.allclose(50 * theirs[rule.stock].grad, own, rtol=1e-9, atol=1e-12), rule.stock


def test_training_is_that_of_two_stock_classes_with_shared_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of AdamW in float64, clipped as runs clip, on the tokens that the generator of either side draws."""
    monkeypatch.setattr(modeling_loom_rtd, "draw_tokens", lambda logits, words: (logits + noise).argmax(-1))
    model = detector(embedding_size=16, num_hidden_layers=1)
    discriminator, generator = stock_pair(model)
    for name in SHARED:
        setattr(generator.electra.embeddings, name, getattr(discriminator.electra.embeddings, name))
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    theirs = list(dict.fromkeys([*discriminator.parameters(), *generator.parameters()]))
    ours = list(model.parameters())
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in (ours, theirs)]
    first = None
    for step in range(5):
        batch = rows()
        noise = torch.rand(1, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).log().neg()
        noise = -noise.log()
        output = model(**batch)
        drawn = output.corrupted_ids[batch["labels"] != -100]
        losses = stock_losses(discriminator, generator, batch, drawn)
        assert output.generator_loss.item() == pytest.approx(losses[0].item(), rel=1e-9)
        assert output.discriminator_loss.item() == pytest.approx(losses[1].item(), rel=1e-9)
        sums = (output.loss, losses[0] + 50 * losses[1])
        for loss, parameters, optimizer in zip(sums, (ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        first = first or output.generator_loss.item()
    assert output.generator_loss.item() < first - 0.3  # on one batch the generator learns


def test_the_disentangled_part_starts_at_zero() -> None:
    model = LoomEncoderForReplacedTokenDetection(detector(sharing="gradient_disentangled").config)
    assert not model.embedding_delta.weight.any()
    assert model.generator.model.embed_tokens.weight.any()


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("architecture", ["electra", "eurobert"])  # eurobert: an untied head
def test_what_is_saved_is_found_again(architecture: str, sharing: str, tmp_path: Any) -> None:
    model, batch = detector(architecture, sharing).eval(), rows()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForPreTraining.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is LoomEncoderForReplacedTokenDetection
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded.eval()(**batch).loss, model(**batch).loss)
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    assert (loaded.generator.model.embed_tokens.weight is loaded.get_input_embeddings().weight) == (sharing != "none")
    assert type(model_from_config(loaded.config)) is LoomEncoderForReplacedTokenDetection
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    lost = {name for name in report["missing_keys"] if name.startswith("model.")}
    assert lost == ({"model.embed_tokens.weight"} if sharing == "gradient_disentangled" else set())
    assert torch.equal(classifier.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    register_hub_code(model)
    assert model.config.auto_map["AutoModelForPreTraining"] == (
        "modeling_loom_rtd.LoomEncoderForReplacedTokenDetection"
    )


@pytest.mark.parametrize("sharing", SHARINGS)
def test_both_parts_stand_alone(sharing: str) -> None:
    """The discriminator with its embeddings added up, as it is published; the generator as a masked language model."""
    model, batch = detector(sharing=sharing).eval(), rows()
    output = model(**batch)
    alone = LoomEncoderForReplacedTokenDetection(model.discriminator_config()).double().eval()
    assert not wants_dropout_keys(alone.config)
    alone.load_state_dict(model.discriminator_state(), strict=True)
    given = {"input_ids": output.corrupted_ids, "attention_mask": batch["attention_mask"]}
    assert relative(alone(**given).logits, output.logits) < 1e-12
    finished = alone(**given, labels=output.is_replaced.long())
    assert finished.loss.item() == pytest.approx(50 * output.discriminator_loss.item(), rel=1e-9)
    unknown = torch.full_like(output.corrupted_ids, -100)
    assert alone(**given, labels=unknown).loss.item() == 0.0
    generator = LoomEncoderForMaskedLM(model.generator.config).double().eval()
    missing, unexpected = generator.load_state_dict(model.generator_state(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert relative(generator(**batch).loss, output.generator_loss) < 1e-12
    with pytest.raises(ValueError, match="generator_size"):
        alone.generator_state()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_published_parts_are_joined_again(sharing: str) -> None:
    more = {"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 6, "hidden_dropout": 0.25}
    model, batch = detector(sharing=sharing, embedding_size=16, generator=more).eval(), rows()
    parts = model.published_parts()
    parts[0].config.rtd_sharing = sharing if sharing == "gradient_disentangled" else "tied"  # as a foreign config says
    joined = join_parts(*parts)
    assert joined.config.rtd_sharing == sharing
    assert joined.generator.config.to_dict() == model.generator.config.to_dict()
    assert joined.all_tied_weights_keys == model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        assert torch.allclose(joined.state_dict()[name], tensor, rtol=0, atol=1e-15), name
    assert relative(joined(**batch).loss, model(**batch).loss) < 1e-12
    if sharing == "tied":
        assert joined.generator.model.embed_tokens.weight is joined.model.embed_tokens.weight


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_discriminator_gets_a_new_generator(sharing: str) -> None:
    model, batch = detector(sharing="none", hidden_size=32).eval(), rows()
    alone = model.published_parts()[0]
    torch.manual_seed(0)
    joined = join_parts(alone, rtd_sharing=sharing, rtd_weight=20.0)
    assert (joined.config.generator_size, joined.generator.config.hidden_size) == (GENERATOR_SIZE, 8)
    assert type(model_from_config(joined.config)) is LoomEncoderForReplacedTokenDetection
    without = {name: value for name, value in batch.items() if name != "labels"}
    assert relative(joined(**without).logits, alone(**without).logits) < 1e-12
    table = joined.generator.model.embed_tokens.weight
    assert torch.equal(table, alone.model.embed_tokens.weight) == (sharing != "none")
    output = joined(**batch)
    assert output.loss.item() == pytest.approx((output.generator_loss + 20 * output.discriminator_loss).item())


def test_parts_that_do_not_belong_together_are_refused() -> None:
    alone = detector().published_parts()[0]
    for other in (detector(vocab_size=62), detector("bert")):
        with pytest.raises(ValueError, match="does not belong to a discriminator of electra with 61"):
            join_parts(alone, other.published_parts()[1])
    with pytest.raises(ValueError, match=r"generator_size must lie in \(0, 1\], got 2"):
        join_parts(alone, detector(hidden_size=48, embedding_size=24, generator_size=1).published_parts()[1])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_larger_vocabulary_reaches_every_table(sharing: str) -> None:
    model, batch = detector(sharing=sharing).eval(), rows()
    before = model(**batch).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == model.generator.config.vocab_size == 70
    assert model.generator.lm_head.out_features == 70
    assert model.generator.lm_head.weight is model.generator.model.embed_tokens.weight
    without = {name: value for name, value in batch.items() if name != "labels"}
    without["input_ids"] = without["input_ids"].clamp(max=60)
    assert model(**without).logits.shape == before.shape
    batch["input_ids"][0, 0] = 69
    assert torch.isfinite(model(**batch).loss)
    if sharing == "tied":
        assert model.model.embed_tokens.weight is model.generator.model.embed_tokens.weight
        assert model.generator.lm_head.weight is model.model.embed_tokens.weight


# --- configuration ----------------------------------------------------------------------------------------------------


def test_published_sizes_of_generators() -> None:
    """ELECTRA small and base, Clark et al. 2020, table 6; embeddings of the discriminator's width."""
    base = loom_config("electra", generator_size=1 / 3).generator_config()
    assert (base.hidden_size, base.num_attention_heads, base.intermediate_size) == (256, 4, 1024)
    assert (base.embedding_size, base.num_hidden_layers, base.head_dim, base.vocab_size) == (768, 12, 64, 30_522)
    sizes = {"hidden_size": 256, "embedding_size": 128, "num_attention_heads": 4, "intermediate_size": 1024}
    small = loom_config("electra", **sizes, generator_size=0.25, generator={"num_hidden_layers": 6}).generator_config()
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == (64, 1, 256)
    assert (small.embedding_size, small.num_hidden_layers, small.num_hidden_groups) == (128, 6, 6)
    tiny = loom_config("electra", hidden_size=16, num_attention_heads=2, generator_size=0.25).generator_config()
    assert (tiny.hidden_size, tiny.num_attention_heads, tiny.head_dim) == (4, 1, 4)  # heads fill the width, as there
    uneven = loom_config("electra", hidden_size=80, num_attention_heads=10, generator_size=0.25).generator_config()
    assert (uneven.hidden_size, uneven.num_attention_heads, uneven.head_dim) == (20, 2, 10)
    own = loom_config("electra", generator_size=1 / 3, rtd_sharing="none").generator_config()
    assert own.embedding_size == own.hidden_size == 256


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"generator_size": 0.0}, r"generator_size must lie in \(0, 1\], got 0.0"),
        ({"generator_size": 2}, r"generator_size must lie in \(0, 1\], got 2"),
        ({"generator": {"num_hidden_layers": 2}}, "set generator_size"),
        ({"generator_size": 0.5, "generator": {"vocab_size": 9}}, "generator: vocab_size is no key of its own"),
        ({"generator_size": 0.5, "generator": {"embedding_size": 9}}, "generator: embedding_size is no key of its own"),
        ({"generator_size": 0.5, "generator": {"num_hiden_layers": 2}}, "did you mean 'num_hidden_layers'"),
        ({"generator_size": 0.5, "generator": {"hidden_act": "swish"}}, "the generator: hidden_act 'swish'"),
        ({"generator_size": 0.5, "rtd_weight": 0}, "rtd_weight must be a number above 0"),
        ({"generator_size": 0.5, "rtd_sharing": "both"}, "rtd_sharing 'both' is unknown"),
    ],
)
def test_impossible_generators_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config("electra", **keys)


def test_what_a_step_costs_counts_both_stacks() -> None:
    """Every matrix once a token, but the generator's head at masked tokens alone."""
    model = detector(hidden_size=32)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_" not in name}
    of_head = matrices.pop("generator.head.dense.weight") + 61 * model.config.embedding_size
    matrices["generator.model.embed_project.weight"] = model.generator.model.embed_project.weight.numel()
    assert num_multiplied_parameters(model.config, 0.25) == sum(matrices.values()) + 0.25 * of_head
    seen = 12 * 2 * 10 * (32 + 16)  # 2 layers each, 10 keys, both widths
    assert flops_per_token(model.config, 10, 0.25) == 6 * num_multiplied_parameters(model.config, 0.25) + seen


def test_keys_are_wanted_where_something_is_drawn() -> None:
    assert wants_dropout_keys(detector().config)
    assert not wants_dropout_keys(tiny_config("electra"))
    assert model_class(tiny_config("electra"), "replaced_token_detection") is LoomEncoderForReplacedTokenDetection


def test_backends_reach_both_stacks() -> None:
    model, batch = detector(), rows()
    loss = model(**batch, dropout_keys=KEYS).loss
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == model.generator.config._attn_implementation == "eager"
    assert model(**batch, dropout_keys=KEYS).loss.item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("keys", [KEYS[:3], KEYS.int(), KEYS[:, None]])
def test_keys_that_are_not_one_a_row_are_refused(keys: Tensor) -> None:
    with pytest.raises(ValueError, match=r"dropout_keys: .* for 4 rows; give one int64 a row"):
        detector()(**rows(), dropout_keys=keys)


def test_a_generator_needs_tokens() -> None:
    model, batch = detector(), rows()
    states = torch.zeros(4, 12, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=states, labels=batch["labels"])
