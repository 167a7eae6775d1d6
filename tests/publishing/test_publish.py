"""`pretrain publish` over HTTP: nothing before --yes, one commit, private, never over another model, no secret said."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pretrain.files import ArtifactError, write_manifest
from pretrain.publish import NOTHING_SENT, Wanted, publish
from pretrain.publishing.hub import Hub, HubUnreachableError, PublishError
from tests.local_hub import READER, WRITER, Fault, LocalHub
from tests.publishing.conftest import copy_of, write_model

REPO = "local/model"


def said(model: Path, *, yes: bool = True, code: int = 0, repository: str = REPO, **wanted: object) -> str:
    """What a person sees; the exit code is compared."""
    console = Console(file=io.StringIO(), width=200)
    assert publish(model, Wanted(repository, **wanted), yes=yes, console=console) == code  # type: ignore[arg-type]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "hf_local" not in shown
    return shown


def commits(server: LocalHub, revision: str = "main") -> list[dict[str, object]]:
    return server.repositories.history(REPO, revision)


def held(server: LocalHub, revision: str = "main") -> dict[str, bytes]:
    """The files of a revision."""
    files = server.repositories.resolve(REPO, revision)[1]["files"]
    return {name: server.repositories.open(entry["sha256"]).read() for name, entry in files.items()}


def sent_files(server: LocalHub) -> int:
    return len([request for request in server.asked("PUT", "^/storage") if request.status == 200])


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_without_yes_only_questions_are_asked(server: LocalHub, model: Path) -> None:
    shown = said(model, yes=False, code=NOTHING_SENT)
    assert {request.method for request in server.requests} == {"GET"}
    assert not server.repositories.exists(REPO)
    for path in model.iterdir():
        assert path.name in shown
        assert f"{path.stat().st_size:,}" in shown
    assert "nothing was sent" in shown
    assert "private" in shown
    assert "as local" in shown


def test_one_private_commit_holds_every_file(server: LocalHub, model: Path) -> None:
    said(model)
    assert server.repositories.read(REPO)["private"] is True
    assert len(commits(server)) == 2  # the Hub's first one, and ours
    files = held(server)
    for path in model.iterdir():
        assert files.pop(path.name) == path.read_bytes()
    record = json.loads(files.pop("pretrain.json"))
    assert record["model_type"] == "bert"
    assert len(record["files"]) == 5
    assert set(files) == {".gitattributes"}
    again = len(server.requests)
    assert "nothing new" in said(model)
    assert len(commits(server)) == 2
    assert not [one for one in server.requests[again:] if "commit/" in one.path or one.method == "PUT"]


def test_files_that_are_not_the_models_are_told_and_left_out(server: LocalHub, model: Path) -> None:
    (model / "notes.txt").write_text("what I think of my boss")
    (model / "wandb").mkdir()
    (model / "wandb" / "log.txt").write_text("x")
    (model / ".env").write_text("x")
    shown = said(model)
    assert "main: never sent: .env" in shown
    assert "known to be the model's: notes.txt, wandb/ (1 file); --also" in shown
    assert not {"notes.txt", "wandb/log.txt", ".env"} & set(held(server))
    shown = said(model, also=("notes.txt",))
    assert "wandb/ (1 file)" in shown
    assert held(server)["notes.txt"] == b"what I think of my boss"
    assert "is removed" in said(model)
    assert "notes.txt" not in held(server)


def test_an_export_that_was_moved_still_goes_by_its_manifest(server: LocalHub, model: Path) -> None:
    write_manifest(model, kind="export", config={})
    (model / "vocab.txt").write_text("of another model")
    assert "vocab.txt; --also" in said(model)
    assert "vocab.txt" not in held(server)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="was altered"):
        said(model)
    (model / "manifest.json").write_text('{"kind": "of another library"}')
    said(model)
    assert "vocab.txt" in held(server)


def test_public_has_to_be_said(server: LocalHub, model: Path) -> None:
    server.repositories.create(REPO, private=False)
    with pytest.raises(PublishError, match="--public"):
        said(model)
    assert len(commits(server)) == 1
    said(model, public=True)
    assert len(commits(server)) == 2


def test_a_revision_begins_empty(server: LocalHub, model: Path, tmp_path: Path) -> None:
    """What lies on main is not in another revision."""
    (model / "LICENSE").write_text("of main")
    said(model)
    (model / "LICENSE").unlink()
    said(model, revision="v2")
    assert "LICENSE" in held(server)
    assert "LICENSE" not in held(server, "v2")


def test_replacing_leaves_nothing_of_the_other_model(server: LocalHub, model: Path, tmp_path: Path) -> None:
    said(model)
    head = server.repositories.resolve(REPO, "main")[0]
    note = {"key": "file", "value": {"path": "picture.svg", "content": "eHg="}}
    server.repositories.commit(REPO, "main", [note], title="by hand", message="", parent=head)
    smaller = write_model(tmp_path / "smaller", shards=1)
    with pytest.raises(PublishError, match="holds a bert model of an unknown run"):
        said(smaller)
    said(smaller, replace=True)
    files = held(server)
    assert not [name for name in files if "of-00002" in name]
    assert "picture.svg" not in files  # --replace takes ours alone


def test_the_next_version_of_a_run_replaces_its_own_files(server: LocalHub, model: Path, tmp_path: Path) -> None:
    origin = {"run_id": "run1", "step": 5, "tokens": 50, "model_type": "bert", "files": {}}
    (model / "pretrain.json").write_text(json.dumps(origin))  # as a model that was downloaded has it
    said(model)
    smaller = write_model(tmp_path / "smaller", seed=1, shards=1)
    (smaller / "pretrain.json").write_text(json.dumps(origin | {"step": 9, "tokens": 90}))
    head = server.repositories.resolve(REPO, "main")[0]
    note = {"key": "file", "value": {"path": "picture.svg", "content": "eHg="}}
    server.repositories.commit(REPO, "main", [note], title="by hand", message="", parent=head)
    assert "is removed" in said(smaller)
    files = held(server)
    assert not [name for name in files if "of-00002" in name]
    assert "picture.svg" in files
    assert commits(server)[0]["title"] == "bert: step 9, 90 tokens seen"
    assert len(commits(server)) == 4


def test_a_card_that_was_edited_there_stays(server: LocalHub, model: Path) -> None:
    (model / "README.md").write_text("# ours\n")
    said(model)
    (model / "README.md").write_text("# ours, better\n")
    assert "replaces another one" in said(model)
    head = server.repositories.resolve(REPO, "main")[0]
    edit = {"key": "file", "value": {"path": "README.md", "content": "IyB0aGVpcnMK"}}
    server.repositories.commit(REPO, "main", [edit], title="edited", message="", parent=head)
    assert "edited on the Hub" in said(model)
    assert held(server)["README.md"] == b"# theirs\n"
    said(model, replace=True)
    assert held(server)["README.md"] == b"# ours, better\n"


def test_large_files_go_in_parts(server: LocalHub, model: Path) -> None:
    server.part_bytes = 1500
    said(model)
    assert sent_files(server) == 2 * 5
    for path in model.glob("*.safetensors"):
        assert held(server)[path.name] == path.read_bytes()


# --- another model --------------------------------------------------------------------------------------------------


def test_another_model_is_never_replaced_without_a_flag(server: LocalHub, model: Path, tmp_path: Path) -> None:
    said(model)
    before, asked = held(server), len(server.requests)
    other = write_model(tmp_path / "other", seed=1)
    for revision in ("main", "elsewhere"):
        with pytest.raises(PublishError, match="--replace"):
            said(other, revision=revision)
    assert held(server) == before
    assert {request.method for request in server.requests[asked:]} == {"GET"}
    said(other, replace=True)
    assert held(server)["model-00001-of-00002.safetensors"] == (other / "model-00001-of-00002.safetensors").read_bytes()


def test_a_model_that_others_put_there_is_another_one(server: LocalHub, model: Path) -> None:
    server.repositories.create(REPO, private=True)
    theirs = {"key": "file", "value": {"path": "config.json", "content": "e30="}}
    server.repositories.commit(REPO, "main", [theirs], title="theirs", message="", parent=None)
    with pytest.raises(PublishError, match="says not where it comes from"):
        said(model)
    assert held(server)["config.json"] == b"{}"


def test_a_repository_without_a_model_is_filled(server: LocalHub, model: Path) -> None:
    server.repositories.create(REPO, private=True)
    said(model)
    assert "config.json" in held(server)


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_without_a_token_it_is_shown_and_not_sent(
    server: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "no token" in said(model, yes=False, code=NOTHING_SENT)
    with pytest.raises(PublishError, match="hf auth login"):
        said(model)
    assert not server.repositories.exists(REPO)


@pytest.mark.parametrize(("token", "words"), [("hf_" + "wrong" * 7, "401"), (READER, "403")])
def test_a_wrong_token_is_refused_and_not_repeated(
    server: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch, token: str, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=words) as refused:
        said(model)
    assert token not in str(refused.value)
    assert not server.repositories.exists(REPO)


@pytest.mark.parametrize(
    "repository",
    [
        *(WRITER, f"local/{WRITER}", f"https://u:{WRITER}@huggingface.co/a/b", "", "a", "a b", "a/../b", "x/y/z", "/b"),
        *("local/", "local/..", "local/a--b", "local/x.git", "local/x.", "local/x-", "local/a名", "local/" + "x" * 100),
    ],
)
def test_a_repository_is_owner_and_name(server: LocalHub, model: Path, repository: str) -> None:
    with pytest.raises(PublishError, match="OWNER/NAME") as refused:
        said(model, repository=repository)
    assert WRITER not in str(refused.value)
    assert not server.requests


@pytest.mark.parametrize("revision", ["", "a b", "refs/pr/1", "a..b", "-x", "x.lock", "x/", "a~1", "版本"])
def test_a_revision_is_a_branch(server: LocalHub, model: Path, revision: str) -> None:
    with pytest.raises(PublishError, match="name of a branch"):
        said(model, revision=revision)
    assert not server.requests
    said(model, yes=False, code=NOTHING_SENT, revision="v2.1/best_one")


def test_a_directory_of_adapters_is_told_from_a_model(server: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="adapters without their model"):
        said(tmp_path / "lora")


def test_a_card_that_is_missing_or_empty_is_told(server: LocalHub, model: Path) -> None:
    assert "the model card is missing; `pretrain card " in said(model, yes=False, code=NOTHING_SENT)
    (model / "README.md").write_text("")
    assert "the model card is empty" in said(model, yes=False, code=NOTHING_SENT)
    (model / "README.md").write_text("# mine")
    assert "model card" not in said(model, yes=False, code=NOTHING_SENT)


def test_a_token_in_the_endpoint_is_refused(server: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://u:{WRITER}@127.0.0.1:1")
    with pytest.raises(PublishError, match="HF_ENDPOINT") as refused:
        Hub(lambda line: None)
    assert WRITER not in str(refused.value)


def test_signed_addresses_are_not_logged(server: LocalHub, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.faults.add(Fault("status", "PUT", times=2))
    said(model)
    assert "Signature=***" in caplog.text
    assert "5ec2e7" not in caplog.text


# --- faults ---------------------------------------------------------------------------------------------------------


def requests_of_a_whole_publish(server: LocalHub, model: Path) -> int:
    said(model)
    return len(server.requests)


@pytest.mark.parametrize(
    ("kind", "method", "path"),
    [
        ("drop", "POST", "repos/create"),
        ("cut", "PUT", "^/storage"),
        ("lose", "POST", "/commit/"),
        ("status", "POST", "paths-info"),
    ],
)
def test_a_lost_request_is_made_again(
    server: LocalHub, model: Path, kind: str, method: str, path: str, waits: list[float]
) -> None:
    """Of a commit whose answer was lost nobody knows whether it was made; it is made once."""
    server.faults.add(Fault(kind, method, path, status=429, retry_after=7))  # type: ignore[arg-type]
    said(model)
    assert len(commits(server)) == 2
    assert len(waits) == 1
    assert waits[0] >= (7 if kind == "status" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "cut", "lose"])
def test_a_lost_connection_at_any_request_leaves_nothing_half(
    server: LocalHub, model: Path, tmp_path: Path, kind: str, waits: list[float]
) -> None:
    """Whichever request is hit, the same call gets through; what is there is the old commit or the new one, whole."""
    count = requests_of_a_whole_publish(server, model)
    whole = held(server)
    for number in range(count):
        name = f"local/hit-{number}"
        server.faults.clear()
        server.faults.add(Fault(kind, after=number))  # type: ignore[arg-type]
        fresh = write_model(tmp_path / f"fresh-{number}", seed=number + 1)
        said(fresh, repository=name)
        history = server.repositories.history(name, "main")
        assert len(history) == 2, (number, [commit["title"] for commit in history])
        assert set(history[0]["files"]) == set(whole)
    assert waits


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(
    server: LocalHub, model: Path, tmp_path: Path, status: int, waits: list[float]
) -> None:
    count = requests_of_a_whole_publish(server, model)
    for number in range(count):
        server.faults.clear()
        server.faults.add(Fault("status", after=number, status=status, retry_after=7))
        said(write_model(tmp_path / f"fresh-{number}", seed=number + 1), repository=f"local/hit-{number}")
        assert len(server.repositories.history(f"local/hit-{number}", "main")) == 2
    assert waits
    assert min(waits) >= 7


def test_what_was_sent_before_a_cut_is_not_sent_again(server: LocalHub, model: Path) -> None:
    server.faults.add(Fault("drop", "POST", "/commit/", times=None))
    with pytest.raises(HubUnreachableError, match="run the same command again"):
        said(model)
    assert len(commits(server)) == 1
    assert sent_files(server) == 2
    server.faults.clear()
    said(model)
    assert len(commits(server)) == 2
    assert sent_files(server) == 2


def test_a_cut_between_two_files_sends_only_the_rest(server: LocalHub, tmp_path: Path) -> None:
    first, both = write_model(tmp_path / "one", shards=1), write_model(tmp_path / "two", shards=2)
    shards = sorted(both.glob("*.safetensors"))
    copy_of(first, tmp_path / "copy")
    server.repositories.receive(_digest(shards[0]), [shards[0].read_bytes()])  # as an earlier call left it
    said(both)
    assert [_digest(shards[1]) in request.path for request in server.asked("PUT", "^/storage")] == [True]


def _digest(path: Path) -> str:
    from pretrain.files import sha256_file

    return sha256_file(path)


def test_a_server_that_never_answers_is_given_up(server: LocalHub) -> None:
    server.faults.add(Fault("hang", times=None))
    with pytest.raises(HubUnreachableError, match="gave no answer"):
        Hub(lambda line: None, timeout=0.2, waits=(0.0,)).user()


def test_a_slow_answer_is_waited_for(server: LocalHub) -> None:
    server.faults.add(Fault("slow", seconds=0.3))
    assert Hub(lambda line: None, timeout=5.0).user() == "local"


@pytest.mark.parametrize("lie", ["size", "digest", "small digest", "missing"])
def test_what_the_hub_has_is_compared(server: LocalHub, model: Path, lie: str) -> None:
    shard = "model-00001-of-00002.safetensors"
    if lie == "size":
        server.faults.lying_sizes[shard] = 3
    elif lie == "digest":
        server.faults.lying_digests[shard] = "0" * 64
    elif lie == "small digest":
        server.faults.lying_digests["config.json"] = "0" * 64
    else:
        server.faults.unlisted.add("config.json")
    with pytest.raises(PublishError, match="does not hold what was sent"):
        said(model)


def test_a_change_by_somebody_else_is_not_overwritten(
    server: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and our commit another commit was made."""
    said(model)
    (model / "tokenizer.json").write_text("{}")
    theirs = {"key": "file", "value": {"path": "theirs.txt", "content": "eHg="}}
    choose = Hub._choose_transfer

    def meanwhile(self: Hub, name: str, revision: str) -> None:
        choose(self, name, revision)
        server.repositories.commit(REPO, "main", [theirs], title="theirs", message="", parent=None)

    monkeypatch.setattr(Hub, "_choose_transfer", meanwhile)
    with pytest.raises(PublishError, match="somebody else"):
        said(model)
    assert held(server)["tokenizer.json"] == b'{"version": "1.0"}'
    assert "theirs.txt" in held(server)


def test_offline_is_said(server: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        said(model)
