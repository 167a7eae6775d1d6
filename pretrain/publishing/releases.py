"""A release: a model directory that becomes a revision of a repository, compared with what is there, sent, checked.

What lives here: what would change, what is refused, the one commit, and reading back what the Hub then has. What must
not: how the Hub is spoken to (`hub`), or what a person sees (`pretrain.publish`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pretrain.publishing.contents import CARD, CONFIG, Contents, Piece
from pretrain.publishing.hub import MAIN, Hub, PublishError, Remote, Repository
from pretrain.publishing.record import RECORD, Origin, Record, record_piece

State = Literal["new", "changed", "unchanged"]

_OF_GIT = ".gitattributes"
_MODEL_FILES = (".safetensors", ".bin", ".pt", ".h5", ".msgpack", ".onnx", ".gguf")


@dataclass(frozen=True)
class Release:
    """What is to become a revision.

    Attributes:
        revision: a branch of the repository: `main`, `step-1000`.
        contents: the model directory.
        origin: where the model comes from.
    """

    revision: str
    contents: Contents
    origin: Origin

    @property
    def message(self) -> str:
        """The title of its commit."""
        words = f"{self.contents.config['model_type']}: {self.origin.describe()}"
        return words if self.origin.run_id is None else f"{words}\n\nrun {self.origin.run_id}"


@dataclass(frozen=True)
class Plan:
    """What a release would change.

    Attributes:
        release: what is to be there.
        pieces: its files with the record, by name in order.
        states: of each file, against what is there.
        removed: paths that an earlier version of the model had, and this one has not.
        kept: paths that are ours too and stay as they are, because somebody has edited them on the Hub.
        head: the commit that the revision stands at; None when it is not there.
    """

    release: Release
    pieces: tuple[Piece, ...]
    states: Mapping[str, State]
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    head: str | None

    @property
    def to_send(self) -> tuple[Piece, ...]:
        """The files that are not there as they should be."""
        return tuple(piece for piece in self.pieces if self.states[piece.name] != "unchanged")

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.head is not None and not self.to_send and not self.removed


def plan_release(
    hub: Hub, release: Release, repository: Repository | None, *, name: str, replace_other: bool = False
) -> Plan:
    """Compare a release with what its revision holds now; only questions are asked.

    Args:
        hub: that is asked.
        release: what is to be there.
        repository: as it is; None when it is not there.
        name: of the repository.
        replace_other: whether another model, and what others wrote, may be replaced.

    Raises:
        PublishError: when another model is there.
    """
    head = None if repository is None else repository.heads.get(release.revision)
    files: dict[str, Remote] = {}
    record: Record | None = None
    if repository is not None and not replace_other:
        for branch in dict.fromkeys((MAIN, release.revision)):
            if branch in repository.heads:
                _refuse_other_model(hub, release, name, branch)
    if head is not None:
        files = hub.files(name, head)
        record = _record_at(hub, name, head, files)
    pieces = list(release.contents.pieces)
    kept: list[str] = []
    if CARD in files and not replace_other and not _is_ours(hub, name, head or "", files[CARD], record, pieces):
        kept = [CARD]
        pieces = [piece for piece in pieces if piece.name != CARD]
    own = record_piece(release.contents, release.origin, pieces)
    states = {piece.name: _state(piece, files.get(piece.name)) for piece in (*pieces, own)}
    described = record is not None and record.origin == release.origin and record.files == _digests(pieces)
    if described and all(states[piece.name] == "unchanged" for piece in pieces):
        # It says the same of the same files; versions of the code that looked at them are no news.
        states[RECORD] = "unchanged"
    names = {piece.name for piece in pieces} | {RECORD, _OF_GIT, *kept}
    gone = set(files) - names
    if not replace_other:
        gone &= set() if record is None else set(record.files)
    return Plan(release, (*pieces, own), states, tuple(sorted(gone)), tuple(kept), head)


def send_release(hub: Hub, release: Release, *, name: str, private: bool, replace_other: bool = False) -> Plan:
    """Bring a revision to what a release wants, by one commit, and compare what the Hub then has; returns what changed.

    A repository or a branch that is not there is made. A branch begins at the repository's first commit, so that it
    holds nothing of others.

    Raises:
        PublishError: when another model is there, or the Hub has other sizes or digests than what was sent.
        HubUnreachableError: when it gave no answer; nothing half is there.
    """
    repository = hub.repository(name)
    if repository is None:
        hub.create(name, private=private)
        repository = hub.repository(name)
    check_visibility(name, repository, private=private)
    if repository is None:
        raise PublishError(f"`{name}` is not to be seen after it was made; look at it on {hub.endpoint}")
    if release.revision not in repository.heads:
        if not replace_other and MAIN in repository.heads:
            _refuse_other_model(hub, release, name, MAIN)
        hub.branch(name, release.revision, hub.first_commit(name))
        repository = hub.repository(name) or repository
    plan = plan_release(hub, release, repository, name=name, replace_other=replace_other)
    assert plan.head is not None, release.revision
    commit = plan.head
    if not plan.is_done:
        commit = hub.commit(
            name,
            release.revision,
            plan.to_send,
            plan.removed,
            parent=plan.head,
            message=release.message,
            done=lambda head: not differences(hub, plan, name, head),
        )
    if found := differences(hub, plan, name, commit):
        raise PublishError(
            f"`{name}` ({release.revision}) does not hold what was sent: {'; '.join(found)}. Do not use it: run the "
            "command again, or remove the revision"
        )
    return plan


def check_visibility(name: str, repository: Repository | None, *, private: bool) -> None:
    """Refuse to show everybody what was meant to be private.

    Raises:
        PublishError: names the remedy.
    """
    if repository is not None and private and not repository.private:
        raise PublishError(f"`{name}` is public, so everybody would see the model; say so with --public")


def differences(hub: Hub, plan: Plan, name: str, commit: str) -> list[str]:
    """Where a commit holds something else than a plan wants, in words."""
    described = hub.described(name, commit, [piece.name for piece in plan.pieces])
    found = []
    for piece in plan.pieces:
        remote = described.get(piece.name)
        if remote is None:
            found.append(f"{piece.name} is missing")
        elif piece.name == RECORD and plan.states[RECORD] == "unchanged":
            continue  # other words for the same
        elif remote.size != piece.size:
            found.append(f"{piece.name} has {remote.size:,} bytes there and {piece.size:,} here")
        elif not _is_same(piece, remote):
            found.append(f"{piece.name} has another SHA-256 there")
    return found


def _refuse_other_model(hub: Hub, release: Release, name: str, branch: str) -> None:
    files = hub.files(name, branch)
    record = _record_at(hub, name, branch, files)
    if record is not None:
        if record.is_same_model(release.origin, release.contents.weights):
            return
        there = record.describe()
    elif any(path == CONFIG or path.endswith(_MODEL_FILES) for path in files):
        remote = {path: files[path].sha256 for path in files if path.endswith(".safetensors")}
        if remote and remote == release.contents.weights:
            return
        there = "a model that says not where it comes from"
    else:
        return
    own = f"of run {release.origin.run_id}" if release.origin.run_id else "from elsewhere"
    raise PublishError(
        f"`{name}` ({branch}) holds {there}, and this is a {release.contents.config['model_type']} model {own}, "
        f"{release.origin.describe()}; give another repository, or replace that model with --replace"
    )


def _record_at(hub: Hub, name: str, revision: str, files: Mapping[str, Remote]) -> Record | None:
    data = hub.read(name, revision, RECORD) if RECORD in files else None
    return None if data is None else Record.read(data)


def _is_ours(
    hub: Hub, name: str, revision: str, remote: Remote, record: Record | None, pieces: Iterable[Piece]
) -> bool:
    """Whether the card that is there is what was sent last, or what is to be sent now."""
    if any(piece.name == CARD and _is_same(piece, remote) for piece in pieces):
        return True
    sent = None if record is None else record.files.get(CARD)
    data = hub.read(name, revision, CARD)
    return sent is not None and data is not None and hashlib.sha256(data).hexdigest() == sent


def _digests(pieces: Iterable[Piece]) -> dict[str, str]:
    return {piece.name: piece.sha256 for piece in pieces}


def _state(piece: Piece, remote: Remote | None) -> State:
    if remote is None:
        return "new"
    return "unchanged" if remote.size == piece.size and _is_same(piece, remote) else "changed"


def _is_same(piece: Piece, remote: Remote) -> bool:
    if remote.sha256 is not None:
        return remote.sha256 == piece.sha256
    data = piece.data if piece.data is not None else piece.path.read_bytes()
    return remote.blob == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
