"""The verb `publish`: a model directory, or the models of a run, on a Hub.

What lives here: which directories are published as which revisions, what a person sees before anything is sent. What
must not: the Hub (`publishing.hub`), what may leave (`publishing.contents`), or the mapping to the published form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from pretrain.building import build_model
from pretrain.card import readdressed, write_card
from pretrain.config import RunConfig, load_config
from pretrain.export import export_model, model_directory
from pretrain.files import MANIFEST, TEMPORARY_PREFIX, ArtifactError, read_manifest
from pretrain.interop.published import CODE
from pretrain.model_dir import write_model
from pretrain.model_reading import read_config
from pretrain.publishing import origins
from pretrain.publishing.contents import CARD, Piece, look_into, refuse_adapters_alone
from pretrain.publishing.hub import (
    MAIN,
    Hub,
    PublishError,
    Repository,
    check_branch_name,
    check_repository_name,
)
from pretrain.publishing.origins import Source
from pretrain.publishing.record import Origin
from pretrain.publishing.releases import Plan, Release, check_visibility, plan_release, send_release
from pretrain.publishing.selection import in_few_words
from pretrain.training import checkpoint

NOTHING_SENT = 3
"""Exit code when what would be done was shown, and `--yes` was not given."""


@dataclass(frozen=True)
class Wanted:
    """What a person asks for.

    Attributes:
        repository: OWNER/NAME.
        revision: of the model; its branch.
        public: whether everybody may see it.
        steps: whether the checkpoints of the run are published too, as `step-N`.
        step_0: whether the model before its first step is, as `step-0`.
        replace: whether another model that is there may be replaced.
        also: patterns of files in the model's directory that are not known to be the model's, and go too.
    """

    repository: str
    revision: str = MAIN
    public: bool = False
    steps: bool = False
    step_0: bool = False
    replace: bool = False
    also: tuple[str, ...] = ()


def publish(model: Path, wanted: Wanted, *, yes: bool = False, console: Console | None = None) -> int:
    """Show what would be sent, and send it when `yes` is given; return the exit code (0 done, 3 nothing sent).

    Args:
        model: a run (its `export/`, or else its newest checkpoint, exported), a fine-tuning (its `model/`), a
            checkpoint, or a model directory.
        wanted: where it goes, and what else.
        yes: without it, only questions are asked.
        console: where it is shown.

    Raises:
        ValueError: when it may not leave, or may not go there; names what is in the way, and the remedy.
        ConnectionError: when the Hub does not answer.
    """
    console = console or Console(stderr=True)
    _check(wanted)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    with _releases(model, wanted, console) as releases:
        for release in releases:
            for line in _staying(release):
                say(line)
            sizes = {piece.name: piece.size for piece in release.contents.pieces}
            if not sizes.get(CARD) and release.revision == wanted.revision:
                lacking = "is empty" if CARD in sizes else "is missing"
                say(
                    f"{release.revision}: the model card {lacking}; `pretrain card {release.contents.directory} "
                    "--overwrite` writes one"
                )
        hub = Hub(say)
        user = hub.user()
        repository = hub.repository(wanted.repository)
        check_visibility(wanted.repository, repository, private=not wanted.public)
        plans = [
            plan_release(hub, release, repository, name=wanted.repository, replace_other=wanted.replace)
            for release in releases
        ]
        for plan in plans:
            console.print(plan_table(plan), soft_wrap=False)
        say(_where(hub, wanted, repository, user))
        if not yes:
            say("nothing was sent; add --yes to send it")
            return NOTHING_SENT
        if user is None:
            raise PublishError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
        for release in releases:
            done = send_release(
                hub, release, name=wanted.repository, private=not wanted.public, replace_other=wanted.replace
            )
            bytes_sent = sum(piece.size for piece in done.to_send)
            said = (
                f"{len(done.to_send)} files, {bytes_sent:,} bytes in one commit" if not done.is_done else "nothing new"
            )
            say(f"{wanted.repository} ({release.revision}): {said}; every size and SHA-256 compared")
    return 0


def _check(wanted: Wanted) -> None:
    check_repository_name(wanted.repository)
    check_branch_name(wanted.revision)
    if (wanted.steps or wanted.step_0) and wanted.revision != MAIN:
        raise PublishError(f"--revision {wanted.revision} names one model, and --steps publishes several; give one")


# --- which models ---------------------------------------------------------------------------------------------------


@contextmanager
def _releases(model: Path, wanted: Wanted, console: Console) -> Iterator[list[Release]]:
    """The releases that are asked for; what has to be exported first lies beside the run until the end."""
    run = model if origins.is_run(model) else None
    if (wanted.steps or wanted.step_0) and run is None:
        raise PublishError(f"`{model}` is no run; --steps and --step-0 need one: OUT/NAME, as training made it")
    if not model.is_dir():
        raise ArtifactError(f"`{model}` is no directory; give a run, a checkpoint or a model directory")
    around = run or (origins.of_checkpoint(model).run if origins.is_checkpoint(model) else None)
    with TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}publish-", dir=around) as folder:
        workspace = Path(folder)
        sources = [(wanted.revision, _source(model, workspace, console))]
        _write_card(sources[0][1], wanted.repository)
        if run is not None and (wanted.steps or wanted.step_0):
            config = _config_of(run)
            if wanted.step_0:
                sources.append(("step-0", _before_the_first_step(config, run, workspace, console)))
            if wanted.steps:
                sources += _checkpoints(config, run, workspace, console)
        first, *others = sources
        yield [_release(*first, wanted.repository, wanted.also), *(_release(*one, wanted.repository) for one in others)]


def _release(revision: str, source: Source, repository: str, also: Sequence[str] = ()) -> Release:
    contents = look_into(source.directory, source.digests, also)
    contents = replace(contents, pieces=tuple(_addressed(piece, repository) for piece in contents.pieces))
    if not contents.config.get("auto_map") or str(contents.config["model_type"]).startswith("loom_"):
        read_config(source.directory)  # whether transformers reads it
    return Release(revision, contents, source.origin)


def _source(model: Path, workspace: Path, console: Console) -> Source:
    """The model directory that a run, a checkpoint or a model directory is published as."""
    if origins.is_tuning(model):
        model = model / origins.MODEL
    if (model / "config.json").is_file():
        source = origins.of_directory(model)
        if source.checkpoint is None:
            return source
        model = source.checkpoint
    refuse_adapters_alone(model)
    if origins.is_checkpoint(model):
        return _exported(origins.of_checkpoint(model), workspace / "main", console)
    newest = model_directory(model).parent
    export = model / "export"
    if (export / MANIFEST).is_file():
        made_from = read_manifest(export, "export").inputs.get("checkpoint")
        if made_from == read_manifest(newest, "checkpoint").digest:
            return origins.of_directory(export)
        console.print(f"{export} is not of the newest checkpoint ({newest.name}), which is exported", highlight=False)
    return _exported(replace(origins.of_checkpoint(newest), run=model), workspace / "main", console)


def _exported(source: Source, out: Path, console: Console) -> Source:
    """A checkpoint's model in the form that its run is exported in, with the proof that it is the same model."""
    config = None if source.run is None else _config_of(source.run)
    keys = {} if config is None else {"dtype": config.export.dtype, "max_shard_bytes": config.export.max_shard_bytes}
    proof = export_model(
        source.directory,
        out,
        code=config is not None and config.export.to == CODE,
        **keys,  # type: ignore[arg-type]
    )
    console.print(proof.describe(), highlight=False, markup=False)
    return Source(out, source.origin, source.run, checkpoint=source.checkpoint)


def _checkpoints(config: RunConfig, run: Path, workspace: Path, console: Console) -> list[tuple[str, Source]]:
    """Every checkpoint of the run as `step-N`; as it lies there, unless the run is exported in another form."""
    newest = model_directory(run).parent
    own = checkpoint.list_checkpoints(run / "train", run_id=origins.origin_of_checkpoint(newest).run_id)
    found = []
    for path in own:
        source = origins.of_checkpoint(path)
        name = f"step-{source.origin.step}"
        if config.export.dtype != "fp32" or config.objective.kind == "rtd":
            source = _exported(replace(source, run=run), workspace / name, console)
        found.append((name, source))
    if not found:
        raise PublishError(f"`{run}` holds no checkpoints on this disk; --steps has nothing to publish")
    return found


def _before_the_first_step(config: RunConfig, run: Path, workspace: Path, console: Console) -> Source:
    """The model as training began with it: its weights drawn again from the seed, or read again from `model.from`."""
    model = build_model(config, console=console)
    drawn = workspace / "drawn"
    drawn.mkdir()
    write_model(model, drawn, tokenizer_directory=run / "tokenizer", code=config.export.to == CODE)
    run_id = origins.origin_of_checkpoint(model_directory(run).parent).run_id
    return _exported(Source(drawn, Origin(run_id, 0, 0), run), workspace / "step-0", console)


def _config_of(run: Path) -> RunConfig:
    """The configuration that a run was trained with, wherever its directory lies now."""
    if origins.is_tuning(run.resolve().parent):
        raise ArtifactError(f"`{run}` is one seed of a fine-tuning; give `{run.resolve().parent}`, whose model is sent")
    path = run / "train" / "config.yaml"
    if not path.is_file():
        raise ArtifactError(f"`{path}` is missing, so it is not known how the run is exported; give a model directory")
    place = run.resolve()
    return load_config(path).model_copy(update={"out": str(place.parent), "name": place.name})


def _write_card(source: Source, repository: str) -> None:
    """A card beside a model of a run that has none."""
    if source.run is not None and not (source.directory / CARD).exists():
        write_card(source.directory, source.run, checkpoint=source.checkpoint, repository=repository)


def _addressed(piece: Piece, repository: str) -> Piece:
    """A card whose lines load the model from where it will be; any other file as it is."""
    if piece.name != CARD:
        return piece
    text = piece.path.read_text(encoding="utf-8")
    data = readdressed(text, repository).encode()
    return piece if data == text.encode() else Piece(piece.name, piece.path, len(data), sha256(data).hexdigest(), data)


# --- what a person sees ---------------------------------------------------------------------------------------------


def _staying(release: Release) -> Iterator[str]:
    """A line for what never leaves, and one for what does when somebody asks."""
    selection = release.contents.selection
    if selection.never:
        yield f"{release.revision}: never sent: {', '.join(in_few_words(selection.never))}"
    if selection.unknown:
        yield (
            f"{release.revision}: left out, as they are not known to be the model's: "
            f"{', '.join(in_few_words(selection.unknown))}; --also NAME (or '*.txt') sends one too"
        )


def plan_table(plan: Plan) -> Table:
    """Every file of a release with its bytes, and what happens to it."""
    table = Table(title=f"{plan.release.revision}: {plan.release.origin.describe()}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("", overflow="fold")
    words = {"new": "is sent", "changed": "replaces another one", "unchanged": "is there already"}
    for piece in plan.pieces:
        table.add_row(piece.name, f"{piece.size:,}", words[plan.states[piece.name]])
    for name in plan.removed:
        table.add_row(name, "", "is removed: of an earlier version")
    for name in plan.kept:
        table.add_row(name, "", "stays as it is: edited on the Hub (--replace takes ours)")
    table.add_section()
    table.add_row(f"{len(plan.to_send)} of {len(plan.pieces)} files", f"{_bytes(plan.to_send):,}", "to send")
    return table


def _bytes(pieces: Sequence[object]) -> int:
    return sum(int(getattr(piece, "size", 0)) for piece in pieces)


def _where(hub: Hub, wanted: Wanted, repository: Repository | None, user: str | None) -> str:
    if repository is None:
        state = f"is made, {'public' if wanted.public else 'private'}"
    elif repository.private:
        state = "is there, private" + (
            ", and stays so: its settings on the Hub make it public" if wanted.public else ""
        )
    else:
        state = "is there, public"
    who = f"as {user}" if user is not None else "no token: log in with `hf auth login`, or set HF_TOKEN"
    return f"{hub.endpoint}/{wanted.repository} {state}; {who}"
