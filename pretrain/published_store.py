"""The model of a checkpoint, stored in its published form and read back by the model's own names.

What lives here: what the trainer asks of a model store. What must not: how names are mapped, or how
a directory is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from pretrain.files import ArtifactError
from pretrain.interop import Rule, rules_from_stock
from pretrain.interop.published import joined_names
from pretrain.model_dir import write_model, write_model_share
from pretrain.model_reading import read_config, read_state
from pretrain.models import LoomConfig


class PublishedStore:
    """The trainer's model store: every checkpoint holds the model as it is published, `code` in our own form."""

    def __init__(self, tokenizer_directory: Path | None = None, *, code: bool = False) -> None:
        self.tokenizer_directory, self.code = tokenizer_directory, code

    def write(self, model: PreTrainedModel, weights: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
        """Write the model directory in full precision."""
        return write_model(
            model, directory, weights=weights, tokenizer_directory=self.tokenizer_directory, code=self.code
        )

    def together(self, model: PreTrainedModel, names: Iterable[str]) -> list[list[str]]:
        """The names of the model's tensors; those of one list are joined, so that one process must write them."""
        return joined_names(model, names, code=self.code)

    def write_share(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        directory: Path,
        shares: Sequence[Collection[str]],
        number: int,
    ) -> dict[str, str]:
        """Write one share of the model directory in full precision."""
        return write_model_share(
            model,
            directory,
            weights=weights,
            shares=shares,
            number=number,
            tokenizer_directory=self.tokenizer_directory,
            code=self.code,
        )

    def read(self, model: PreTrainedModel, directory: Path) -> Mapping[str, Tensor]:
        """The weights by the model's own names, tied ones once, as they are stored; buffers go into the model.

        Bytes are read, and tensors split and transposed, when a weight is asked for.
        """
        state = read_state(directory)
        wanted = next(parameter.dtype for parameter in model.parameters())
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.dtype != wanted:  # a silent cast would lose bits
                raise ArtifactError(
                    f"the saved `{name}` in `{directory}` is {tensor.dtype}, the run trains {wanted}; a checkpoint "
                    "holds the full precision: put the whole one back"
                )
        rules = [Rule(name, (name,)) for name in state]
        config = read_config(directory)
        if isinstance(model.config, LoomConfig) and not isinstance(config, LoomConfig):
            _, rules = rules_from_stock(config, state)
        weights = _StoredWeights(state, rules)
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(weights.pop(name))
        return weights


class _StoredWeights(Mapping[str, Tensor]):
    """Published tensors by the model's own names, each made when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], rules: Iterable[Rule]) -> None:
        self._state = state
        self._homes = {
            name: (rule, number) for rule in rules if not rule.summed for number, name in enumerate(rule.loom)
        }

    def __getitem__(self, name: str) -> Tensor:
        rule, number = self._homes[name]
        return rule.split(self._state[rule.stock])[number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def pop(self, name: str) -> Tensor:
        """A tensor, left out from now on."""
        tensor = self[name]
        del self._homes[name]
        return tensor
