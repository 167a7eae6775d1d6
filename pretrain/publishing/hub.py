"""The Hub as we speak to it, through huggingface_hub: with time limits, tries, and no secret in any message.

What lives here: questions, a repository or branch made, one commit, and what follows from each failure. What must not:
what is sent, or whether it should be.

The token is the one of the environment (`HF_TOKEN`) or of `hf auth login`; nothing here takes one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import default_client_factory, get_session, hf_raise_for_status, set_client_factory
from huggingface_hub.utils._validators import validate_repo_id

from pretrain.publishing.contents import Piece
from pretrain.publishing.leaks import holds_token, redact_library, without_secrets

MAIN = "main"
TIMEOUT_SECONDS = 120.0
"""How long an answer may take, or a piece of one."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between two tries of a question that was not answered."""

_LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BRANCH = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
_CHUNK = 500  # paths of one question

# The class of all failures of the HTTP library, whichever one huggingface_hub is built on (httpx, httpx2).
_HTTP_ERRORS: type[Exception] = HfHubHTTPError.__bases__[0]

Answer = TypeVar("Answer")


class PublishError(ValueError):
    """What cannot be published as it is asked for; names what is in the way, and the remedy."""


class HubUnreachableError(ConnectionError):
    """The Hub gave no answer, or none that says anything; the same command again goes on."""


class MovedError(PublishError):
    """Somebody else has changed the revision meanwhile."""


@dataclass(frozen=True)
class Remote:
    """A file in a repository: `sha256` of a large one, git's `blob` of every one (of a large one, its pointer's)."""

    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A repository that is there.

    Attributes:
        name: OWNER/NAME.
        private: whether others see it.
        heads: the commit of each branch.
    """

    name: str
    private: bool
    heads: Mapping[str, str]


def check_repository_name(name: str) -> str:
    """Refuse what is no OWNER/NAME; a token in it is not repeated.

    Raises:
        PublishError: says what is expected.
    """
    if holds_token(name) or "@" in name:
        raise PublishError(
            "the repository's name holds a token or a password; give OWNER/NAME, and the token by `hf auth login` or "
            "the variable HF_TOKEN alone"
        )
    written = f"repository `{without_secrets(name)}`: write OWNER/NAME, for example my-name/my-model"
    if not _REPOSITORY.fullmatch(name):
        raise PublishError(written)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublishError(f"{written} ({error})") from error
    return name


def check_branch_name(name: str) -> str:
    """Refuse what git, or the Hub, takes for no branch; a token in it is not repeated.

    Raises:
        PublishError: says what is expected.
    """
    if holds_token(name):
        raise PublishError("--revision holds a token; give the name of a branch")
    if not _BRANCH.fullmatch(name) or ".." in name or name.startswith("refs/") or name.endswith((".", ".lock")):
        raise PublishError(f"--revision {name}: give the name of a branch, letters, digits, - _ . and /: v2, step-1000")
    return name


@dataclass
class Hub:
    """A connection to the Hub at `HF_ENDPOINT`.

    Attributes:
        say: gets a line when something is tried again.
        timeout: seconds that an answer may take.
        waits: seconds between tries.
    """

    say: Callable[[str], None]
    timeout: float = TIMEOUT_SECONDS
    waits: Sequence[float] = WAITS
    _api: HfApi = field(init=False)

    def __post_init__(self) -> None:
        if holds_token(constants.ENDPOINT) or "@" in constants.ENDPOINT:
            raise PublishError(
                "HF_ENDPOINT holds a token or a password; take it out, and give the token by `hf auth login` or the "
                "variable HF_TOKEN alone"
            )
        redact_library()
        set_client_factory(self._client)
        self._api = HfApi()

    def _client(self) -> Any:
        client: Any = default_client_factory()
        client.timeout = self.timeout
        return client

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        return str(constants.ENDPOINT)

    # --- questions ------------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        """Whose token is used; None when there is none.

        Raises:
            PublishError: when the Hub does not know it.
        """
        if get_token() is None:
            return None
        return str(self.ask("who the token belongs to", self._api.whoami)["name"])

    def repository(self, name: str) -> Repository | None:
        """A repository; None when it is not there, or not to be seen with this token."""
        try:
            info = self.ask(f"`{name}`", lambda: self._api.model_info(name))
            refs = self.ask(f"the branches of `{name}`", lambda: self._api.list_repo_refs(name))
        except RepositoryNotFoundError:
            return None
        return Repository(name, bool(info.private), {ref.name: ref.target_commit for ref in refs.branches})

    def files(self, name: str, revision: str) -> dict[str, Remote]:
        """Every file of a revision by its path."""
        entries = self.ask(
            f"the files of `{name}`", lambda: list(self._api.list_repo_tree(name, revision=revision, recursive=True))
        )
        return {entry.path: _remote(entry) for entry in entries if hasattr(entry, "blob_id")}

    def described(self, name: str, revision: str, paths: Sequence[str]) -> dict[str, Remote]:
        """Files of a revision by path, as the Hub describes them."""
        found: dict[str, Remote] = {}
        for start in range(0, len(paths), _CHUNK):
            get = partial(self._api.get_paths_info, name, list(paths[start : start + _CHUNK]), revision=revision)
            entries = self.ask(f"the files of `{name}`", get)
            found |= {entry.path: _remote(entry) for entry in entries if hasattr(entry, "blob_id")}
        return found

    def read(self, name: str, revision: str, path: str) -> bytes | None:
        """The bytes of a small file; None when it is not there."""

        def get() -> bytes:
            response = get_session().get(hf_hub_url(name, path, revision=revision), headers=build_hf_headers())
            hf_raise_for_status(response)
            return bytes(response.content)

        try:
            return self.ask(f"`{path}` of `{name}`", get)
        except EntryNotFoundError:
            return None

    def first_commit(self, name: str) -> str:
        """The commit that a repository began with, which holds nothing but git's settings."""
        commits = self.ask(f"the history of `{name}`", lambda: self._api.list_repo_commits(name))
        return str(commits[-1].commit_id)

    # --- changes --------------------------------------------------------------------------------------------------

    def create(self, name: str, *, private: bool) -> None:
        """Make a repository, unless it is there."""
        self.ask(f"to make `{name}`", lambda: self._api.create_repo(name, private=private, exist_ok=True))

    def branch(self, name: str, branch: str, start: str) -> None:
        """Make a branch that stands at a commit, unless it is there."""
        self.ask(
            f"to make the revision {branch}",
            lambda: self._api.create_branch(name, branch=branch, revision=start, exist_ok=True),
        )

    def commit(
        self,
        name: str,
        revision: str,
        pieces: Iterable[Piece],
        removed: Iterable[str],
        *,
        parent: str,
        message: str,
        done: Callable[[str], bool],
    ) -> str:
        """Send files and commit them, all in one commit or none; returns the commit.

        Large files go first, and those that the Hub holds are not sent again. When the connection is lost while the
        commit is made, nobody knows whether it was: the branch is looked at before it is tried again.

        Args:
            name: of the repository.
            revision: the branch.
            pieces: files to add or replace.
            removed: paths to remove.
            parent: the commit that the branch stands at.
            message: its first line is the title.
            done: whether a commit holds what is wanted.

        Raises:
            MovedError: when somebody else has committed meanwhile.
        """
        self._choose_transfer(name, revision)
        title, _, description = message.partition("\n")
        pieces, removed = list(pieces), list(removed)

        def attempt() -> str:
            head = self._head(name, revision)
            if head != parent:
                if done(head):
                    return head
                raise MovedError(f"`{name}` ({revision}) was changed by somebody else meanwhile; run the command again")
            operations: list[Any] = [_addition(piece) for piece in pieces]
            operations += [CommitOperationDelete(path, is_folder=False) for path in removed]
            made = self._api.create_commit(
                name,
                operations,
                commit_message=title,
                commit_description=description.strip(),
                revision=revision,
                parent_commit=parent,
            )
            return str(made.oid)

        return self.ask(f"to commit to `{name}` ({revision})", attempt)

    def _head(self, name: str, revision: str) -> str:
        found = self._api.list_repo_refs(name)
        return next((ref.target_commit for ref in found.branches if ref.name == revision), "")

    def _choose_transfer(self, name: str, revision: str) -> None:
        """Xet, which huggingface_hub takes wherever it is installed, only with a server that has it."""
        if constants.HF_HUB_DISABLE_XET:
            return

        def knows_xet() -> bool:
            url = f"{self.endpoint}/api/models/{name}/xet-write-token/{revision.replace('/', '%2F')}"
            return bool(get_session().get(url, headers=build_hf_headers()).status_code != 404)

        if not self.ask("how files are sent", knows_xet):
            constants.HF_HUB_DISABLE_XET = True

    # --- failures -------------------------------------------------------------------------------------------------

    def ask(self, what: str, question: Callable[[], Answer]) -> Answer:
        """An answer, asked for again while that may help.

        Args:
            what: for messages.
            question: may be called several times.

        Raises:
            RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError: as the Hub says.
            PublishError: when the Hub refuses.
            HubUnreachableError: when it did not answer.
        """
        for wait in (*self.waits, None):
            try:
                return question()
            except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as missing:
                if get_token() is not None and _status(missing) == 401:
                    raise self._refused(what, missing) from None
                raise
            except (PublishError, OfflineModeIsEnabled, LocalTokenNotFoundError) as error:
                raise self._refused(what, error) from None
            except (_HTTP_ERRORS, OSError, RuntimeError, ValueError) as error:
                cause = _cause(error)
                if isinstance(cause, OSError) and not isinstance(cause, (_HTTP_ERRORS, ConnectionError, TimeoutError)):
                    raise  # of a disk
                if not _may_help(cause):
                    raise self._refused(what, cause, error) from None
                if wait is None:
                    raise HubUnreachableError(
                        f"{self.endpoint} gave no answer when asked {what}: {_words(cause)}. Nothing half is there; "
                        "run the same command again, what was sent is not sent twice"
                    ) from None
                seconds = min(max(wait, _retry_after(cause)), _LONGEST_WAIT)
                self.say(f"{_words(cause)}; trying again in {seconds:.0f} s")
                time.sleep(seconds)
        raise AssertionError("every try returns or raises")

    def _refused(self, what: str, error: Exception, told: Exception | None = None) -> Exception:
        """The error that says what is in the way; `told` is what the library made of it."""
        if isinstance(error, PublishError):
            return error
        if isinstance(error, OfflineModeIsEnabled):
            return PublishError("HF_HUB_OFFLINE is set, so the Hub is not asked anything; unset it to publish")
        if isinstance(error, LocalTokenNotFoundError):
            return PublishError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
        status = _status(error)
        if status == 401:
            return PublishError(
                f"{self.endpoint} does not take the token (401) when asked {what}; log in with `hf auth login`, or "
                "set HF_TOKEN to one that is valid"
            )
        if status == 403:
            return PublishError(
                f"the token may not do this (403), asked {what}; take one with the right to write to that repository"
            )
        if status == 412:
            return MovedError("the repository was changed by somebody else meanwhile; run the command again")
        words = " ".join(without_secrets(str(told)).split()) if type(told) is ValueError else _words(error)
        return PublishError(f"{self.endpoint} refused, asked {what}: {words}")


def _remote(entry: Any) -> Remote:
    large = getattr(entry, "lfs", None)
    return Remote(int(entry.size), str(entry.blob_id), None if large is None else str(large.sha256))


def _addition(piece: Piece) -> CommitOperationAdd:
    made = CommitOperationAdd(piece.name, piece.data if piece.data is not None else str(piece.path))
    made.upload_info.sha256 = bytes.fromhex(piece.sha256)  # or every large file would be read once more
    return made


def _cause(error: BaseException) -> Exception:
    """The failure of the connection or of the server that a chain of errors began with; else the error itself."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, _HTTP_ERRORS):
            return at
        at = at.__cause__ or at.__context__
    assert isinstance(error, Exception)
    return error


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _may_help(error: Exception) -> bool:
    """Whether another try may go better."""
    status = _status(error)
    if status is not None:
        return status in _AGAIN
    return isinstance(error, (_HTTP_ERRORS, ConnectionError, TimeoutError))


def _retry_after(error: Exception) -> float:
    response = getattr(error, "response", None)
    try:
        return float(response.headers.get("Retry-After", 0)) if response is not None else 0.0
    except ValueError:  # a date
        return 0.0


def _words(error: Exception) -> str:
    """One line of an error, without secrets."""
    said = str(getattr(error, "server_message", None) or error).strip().splitlines()
    status = _status(error)
    line = said[0] if said else type(error).__name__
    return without_secrets(f"{status}: {line}" if status is not None and str(status) not in line else line)
