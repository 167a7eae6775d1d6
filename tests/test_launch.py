"""The launcher: what it says, when it starts again, and when it gives up. Small programs stand in for the training."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import pretrain.launch as verb
from pretrain.config import RunConfig
from pretrain.files import ArtifactError
from pretrain.heartbeat import Beat
from pretrain.launch import History, Place, Supervision, launch
from pretrain.launching import hangs
from pretrain.stores import Store
from pretrain.training.stored import Stored
from tests.gpu.synthetic import make_run
from tests.launching.ranks import QUICK, command, job

CALM = Supervision(margin=60.0, pause=0.05)
STRICT = Supervision(margin=1.5, pause=0.05)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = {"sequence_length": 16}
    return make_run(
        tmp_path_factory.mktemp("run"), tokens=4000, vocab_size=64, data=data, train={"steps": 20, "batch_tokens": 160}
    )


@pytest.fixture
def config(made: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    """A run of its own: tokenizer and data are there, nothing is trained."""
    monkeypatch.setenv("PLACE", str(tmp_path))
    own = made.model_copy(update={"out": str(tmp_path / "runs")})
    own.directory.mkdir(parents=True)
    for part in ("tokenizer", "data"):
        (own.directory / part).symlink_to(made.directory / part)
    yield own
    assert not list(tmp_path.glob("pretrain-*")), "the signs of life are removed"


class Said:
    """Runs the launcher, and keeps what it says."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.console = Console(record=True, width=200, quiet=False, file=(config.directory / "said").open("w"))
        self.resumed: list[str] = []

    def launch(self, program: str, *, supervision: Supervision | None = CALM, resume: str = "auto") -> int:
        def words(resume: str) -> list[str]:
            self.resumed.append(resume)
            return command(program)

        return launch(
            self.config,
            words,
            processes=2,
            resume=resume,
            supervision=supervision,
            bounds=QUICK,
            console=self.console,
        )

    @property
    def text(self) -> str:
        """All that was said."""
        return " ".join(self.console.export_text(clear=False).split())


@pytest.fixture
def said(config: RunConfig) -> Said:
    return Said(config)


def starts(folder: Path, rank: int = 1) -> int:
    path = folder / f"starts-{rank}"
    return path.stat().st_size if path.exists() else 0


# --- without supervision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 75])
def test_a_good_end_needs_no_words(said: Said, code: int) -> None:
    assert said.launch(f"sys.exit({code})", supervision=None) == code
    assert said.text == ""


def test_a_failure_is_named_with_its_log(said: Said, config: RunConfig) -> None:
    program = "steps(5)\nall_here('a')\nif rank == 1: print('no memory left'); sys.exit(7)\ntime.sleep(60)"
    assert said.launch(program, supervision=None) == 7
    log = config.directory / "train" / "logs" / "rank-00001.log"
    assert f"rank 1 of 2 ended with code 7 in step 5; its log: {log}" in said.text
    assert "rank 1: no memory left" in said.text
    assert starts(Path(config.out).parent) == 0


def test_a_signal_that_ended_a_process_is_named(said: Said) -> None:
    assert (
        said.launch("steps(3)\nall_here('a')\nif rank: os.kill(os.getpid(), 9)\ntime.sleep(60)", supervision=None)
        == 137
    )
    assert "rank 1 of 2 was ended by SIGKILL" in said.text
    assert "in step 3" in said.text


def test_a_mistake_of_the_users_is_said_once(said: Said) -> None:
    assert said.launch("sys.exit(2)", supervision=None) == 2
    assert said.text == ""


def test_missing_data_are_refused_before_anything_is_made(config: RunConfig, said: Said) -> None:
    (config.directory / "data").unlink()
    with pytest.raises(ArtifactError, match="no data"):
        said.launch("sys.exit(0)")
    assert not (config.directory / "train").exists()


def test_a_port_that_was_taken_is_no_failure(said: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first port is another program's by the time that rank 0 wants it."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        ports = [other.getsockname()[1], verb.free_port()]
        monkeypatch.setattr(verb, "free_port", lambda: ports.pop(0))
        program = (
            "starts()\nimport socket\nif rank == 0:\n    socket.socket().bind(('', int(os.environ['MASTER_PORT'])))\n"
        )
        assert said.launch(program, supervision=None) == 0
    assert starts(tmp_path) == 2
    assert "taken by another program" in said.text


# --- supervision ----------------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_started_again(said: Said, tmp_path: Path) -> None:
    program = (
        "first = starts() == 1\nsteps(5)\nall_here(f'a{first}')\n"
        "if first and rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60 if first else 0)"
    )
    assert said.launch(program, resume="never") == 0
    assert [starts(tmp_path, rank) for rank in range(2)] == [2, 2]
    assert said.resumed == ["never", "auto"], "what was saved by the first start is not refused"
    assert "rank 1 of 2 was ended by SIGKILL" in said.text
    assert "starting again in 0.05 s, from step 0: nothing is saved yet" in said.text


@pytest.mark.parametrize("code", [0, 2, 75])
def test_what_is_not_started_again(said: Said, tmp_path: Path, code: int) -> None:
    assert said.launch(f"starts()\nsys.exit({code})") == code
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("phase", ["step", "evaluate", "save"])
def test_an_error_after_the_start_is_no_mistake_of_the_users(said: Said, tmp_path: Path, phase: str) -> None:
    """A disk or a store that fails says 2 as well: whoever trained is started again."""
    program = (
        f"first = starts() == 1\nsteps(5)\nheart.beat(5, {phase!r})\nall_here(f'a{{first}}')\n"
        "sys.exit(2 if first else 0)"
    )
    assert said.launch(program) == 0
    assert starts(tmp_path) == 2
    assert "of 2 ended with code 2 in " in said.text


def test_one_rank_that_began_to_train_is_enough(said: Said, tmp_path: Path) -> None:
    program = (
        "first = starts() == 1\nif rank: heart.beat(0, 'step')\nall_here(f'a{first}')\nsys.exit(2 if first else 0)"
    )
    assert said.launch(program) == 0
    assert starts(tmp_path) == 2


def test_what_trained_once_is_started_again_from_its_start(said: Said, tmp_path: Path) -> None:
    """The store that failed a step is still away when the run goes on."""
    program = "number = starts()\nif number != 2: steps(5)\nall_here(f'a{number}')\nsys.exit(2 if number < 3 else 0)"
    assert said.launch(program) == 0
    assert starts(tmp_path) == 3


def test_an_end_by_policy_repeats_and_is_final(said: Said, tmp_path: Path) -> None:
    """`on_nonfinite: stop` ends at the same step each time."""
    assert said.launch("number = starts()\nsteps(8)\nall_here(f'a{number}')\nsys.exit(2)") == 2
    assert starts(tmp_path) == 3
    assert "step 8 failed 3 times in a row: not started again" in said.text


def test_after_a_stop_signal_nothing_is_started_again(said: Said, tmp_path: Path) -> None:
    """The signal comes while the processes start, and ends them without a save."""
    program = "starts()\nall_here('a')\nif rank: os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    assert said.launch(program) == 143
    assert starts(tmp_path) == 1


def test_a_stop_signal_ends_the_pause(said: Said, tmp_path: Path) -> None:
    slow = Supervision(pause=60.0)
    waits = (
        "import subprocess\nif rank == 0:\n"
        "    subprocess.Popen(['sh', '-c', f'sleep 1; kill -USR1 {os.getppid()}'], start_new_session=True)\n"
    )
    assert (
        said.launch(f"starts()\n{waits}all_here('a')\nos.kill(os.getpid(), 9)", supervision=slow)
        == 128 + signal.SIGUSR1
    )
    assert starts(tmp_path) == 1


HANGS = """
first = starts() == 1
def stuck():
    {how}
all_here(f"a{{first}}")
steps(8)
all_here(f"b{{first}}")
if first:
    heart.beat(8, "step")
    stuck() if rank == 1 else time.sleep(60)
"""


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(60)"], ids=["stopped", "sleeps"])
def test_a_hang_is_found_and_ended(said: Said, config: RunConfig, tmp_path: Path, how: str) -> None:
    started = time.monotonic()
    assert said.launch(HANGS.format(how=how), supervision=STRICT) == 0
    assert time.monotonic() - started < 20
    assert starts(tmp_path) == 2
    pages = list((config.directory / "train" / "logs").glob("stacks-*.txt"))
    assert len(pages) == 1
    page = pages[0].read_text()
    assert str(pages[0]) in said.text
    assert page.count("last sign of life: step 8, step") == 2
    assert "in stuck" in page, "the stacks of a stopped process, too"
    if "SIGSTOP" in how:
        assert "rank 1 hangs in phase step after step 8, stopped by a signal or a debugger" in said.text
        assert "State:\tT" in page


def test_a_slow_step_is_no_hang(said: Said, tmp_path: Path) -> None:
    """Slower than the others, within twice the slowest and the margin; and silence in another phase."""
    program = (
        "starts()\nsteps(4)\nfor step, seconds in ((4, 0.3), (5, 0.8), (6, 1.6)):\n"
        "    heart.beat(step, 'step'); time.sleep(seconds)\n"
        "heart.beat(7, 'save')\ntime.sleep(5.0)"
    )
    assert said.launch(program, supervision=STRICT) == 0
    assert starts(tmp_path) == 1


def test_no_silence_below_the_floor_is_a_hang(said: Said, tmp_path: Path) -> None:
    """`--hang-seconds`: for a step, and for what is not one."""
    floor = Supervision(hang_seconds=2.5, margin=0.2, pause=0.05)
    program = "first = starts() == 1\nsteps(8)\nheart.beat(8, 'step')\ntime.sleep({seconds} if first else 0)"
    assert said.launch(program.format(seconds=1.2), supervision=floor) == 0
    assert starts(tmp_path) == 1
    (tmp_path / "starts-1").unlink()
    (tmp_path / "starts-0").unlink()
    assert said.launch(program.format(seconds=60.0), supervision=floor) == 0
    assert starts(tmp_path) == 2
    assert "2.5 s are allowed" in said.text


def test_the_floor_holds_in_every_phase(tmp_path: Path) -> None:
    watch = hangs.Watch(job(tmp_path, ""), margin=10.0, at_least=700.0)
    for phase, allowed in {"step": 700.0, "evaluate": 700.0, "end": 700.0, "save": 1800.0, "start": 1800.0}.items():
        assert watch._allowed(Beat(8, phase, 9, 0.0, 1.0)) == allowed  # type: ignore[arg-type]


def test_the_first_steps_may_be_slow(said: Said, tmp_path: Path) -> None:
    assert (
        said.launch(
            "starts()\nheart.beat(0, 'step')\ntime.sleep(2.0)\nheart.beat(1, 'step')\ntime.sleep(2.0)",
            supervision=STRICT,
        )
        == 0
    )
    assert starts(tmp_path) == 1


def test_a_silent_phase_has_a_bound_too(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hangs.PHASE_SECONDS, "start", 1.0)  # type: ignore[misc]
    assert said.launch("if starts() == 1: time.sleep(60)", supervision=STRICT) == 0
    assert starts(tmp_path) == 2
    assert "hangs in phase start" in said.text


def test_a_crash_loop_names_the_step_and_its_rows(said: Said, config: RunConfig, tmp_path: Path) -> None:
    from pretrain.data.loader import DataPlane

    program = "number = starts()\nsteps(8)\nall_here(f'a{number}')\nif rank: sys.exit(9)\ntime.sleep(60)"
    assert said.launch(program) == 9
    assert starts(tmp_path) == 3
    assert "step 8 failed 3 times in a row: not started again" in said.text
    assert f"`pretrain inspect {config.directory / 'train' / 'config.yaml'} --step 8` shows its rows" in said.text
    rows = DataPlane.from_config(config).batch(7).row_ids.tolist()
    assert ", ".join(str(row) for row in rows[:8]) + " and 2 more" in said.text


def test_a_crash_loop_at_the_start_has_no_rows(said: Said, tmp_path: Path) -> None:
    assert said.launch("starts()\nsys.exit(5)") == 5
    assert starts(tmp_path) >= 1
    assert "the start failed 3 times in a row: not started again; the processes' logs:" in said.text


def test_other_steps_are_no_loop_but_have_an_end(said: Said, tmp_path: Path) -> None:
    program = "number = starts()\nsteps(3 + number)\nall_here(f'a{number}')\nif rank: sys.exit(9)\ntime.sleep(60)"
    assert said.launch(program, supervision=Supervision(max_restarts=3, pause=0.01)) == 9
    assert "3 restarts in a row gave no newer checkpoint" in said.text
    assert starts(tmp_path) == 4


def test_a_new_checkpoint_begins_the_count_again(said: Said, config: RunConfig, tmp_path: Path) -> None:
    """The same step fails twice, a checkpoint appears, it fails twice more, and the fifth start gets through."""
    program = f"""
number = starts()
steps(8)
step = Path({str(config.directory)!r}) / "train" / "checkpoints" / "step-00000006"
if rank == 0 and number == 3:
    step.mkdir(parents=True)
    (step / "trainer.json").write_text({json.dumps(json.dumps({"state": {"progress": {"step": 6}}}))})
all_here(f"a{{number}}")
sys.exit(0 if number == 5 else 9)
"""
    assert said.launch(program) == 0
    assert starts(tmp_path) == 5
    assert "from the checkpoint of step 6" in said.text


def test_a_checkpoint_in_a_store_begins_the_count_again(said: Said, config: RunConfig, tmp_path: Path) -> None:
    """None lies in the run's directory: the record of the uploads tells."""
    program = f"""
number = starts()
steps(8)
if rank == 0 and number == 3:
    record = Path({str(config.directory)!r}) / "train" / "store.json"
    record.write_text('{{"to": "s3://b", "run": "s3://b/synthetic", "step": 6}}')
all_here(f"a{{number}}")
sys.exit(0 if number == 5 else 9)
"""
    assert said.launch(program) == 0
    assert starts(tmp_path) == 5
    assert "from the newest checkpoint in s3://b/synthetic, of step 6" in said.text


def test_what_a_supervisor_knows_of_a_store(config: RunConfig, tmp_path: Path) -> None:
    """The record is what a save into a store leaves; a newer checkpoint on the disk comes before it."""
    to = f"file://{tmp_path}/store"
    inside = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"to": to})})
    history = History(inside)
    history.failed(Place("the start"), 9)
    assert history.from_where() == f"the newest checkpoint in {to}, if there is one"
    directory = config.directory / "train"
    directory.mkdir()
    saved = SimpleNamespace(step=6, run_id="a")
    Stored(Store.at(to).below("run"), directory, to).settle(saved, best=None, keep=1)  # type: ignore[arg-type]
    history.failed(Place("the start"), 9)
    assert (history.saved, len(history.failures)) == (6, 1)
    assert history.from_where() == f"the newest checkpoint in {to}/run, of step 6"
    local = directory / "checkpoints" / "step-00000008"
    local.mkdir(parents=True)
    (local / "trainer.json").write_text(json.dumps({"state": {"progress": {"step": 8}}}))
    history.failed(Place("the start"), 9)
    assert history.from_where() == "the checkpoint of step 8"


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_of_a_process() -> None:
    words = verb.train_command("run.yaml", ["train.steps=4"], resume="never", allow_changes=["data", "train.seed"])
    assert words[0] == sys.executable
    assert words[1:] == [
        *["-m", "pretrain", "train", "run.yaml", "train.steps=4", "--resume", "never"],
        *["--allow-change", "data", "--allow-change", "train.seed"],
    ]


@pytest.mark.parametrize(
    ("variables", "launched"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, True),
        ({"ACCELERATE_USE_CPU": "true"}, False),
    ],
)
def test_who_started_this_process(variables: dict[str, str], launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert verb.started_by_launcher() == launched
