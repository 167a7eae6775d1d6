"""Who prepares: workers that are killed, parents that are killed, Slurm and Ray, each through a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from data_builders import documents, run_config, write_tokenizer

from pretrain import prepare
from pretrain.data.preparing import executors
from pretrain.data.preparing.submitted import SubmittedError
from pretrain.files import read_manifest
from pretrain.prepare import check_data, prepare_data

TEXTS = [f"document {number} with a few words" for number in range(300)]
WAITS = """
import os, time
from pathlib import Path

def waits(document):
    if document.id == "probe":
        return True
    Path(f"working-{os.getpid()}").touch()
    time.sleep(60)
    return True
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "waiting.py").write_text(WAITS)
    made = prepare.make_plan

    def make_plan(data, splits, **keys):
        return made(data.model_copy(update={"part_bytes": 4000}), splits, **keys)

    monkeypatch.setattr(prepare, "make_plan", make_plan)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(folder: Path, name: str = "run", **data):
    config = run_config(folder, name=name, train=[str(folder / "a.jsonl")], **data)
    if not (config.directory / "tokenizer").exists():
        write_tokenizer(config.directory / "tokenizer", "gpt2", " ".join(TEXTS))
    return config


def waiting_workers(folder: Path, count: int) -> list[int]:
    """The processes that are at work, once there are `count`."""
    for _ in range(600):
        found = [int(path.name.partition("-")[2]) for path in folder.glob("working-*")]
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError("no worker came to work")


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


SLOW = {"filters": [{"name": "LambdaFilter", "parameters": {"filter_function": "waiting:waits"}}]}


def test_a_killed_worker_ends_the_work_and_names_its_part(corpus):
    killer = threading.Thread(target=lambda: os.kill(waiting_workers(corpus, 2)[0], signal.SIGKILL))
    killer.start()
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"on part `train-0000[01]` was killed by SIGKILL.*workers=1"):
        prepare_data(config_of(corpus, workers=2, **SLOW))
    killer.join()
    assert time.monotonic() - began < 40  # the other worker was not waited for
    assert not any(map(is_alive, waiting_workers(corpus, 2)))


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs Linux's /proc")
def test_no_process_outlives_a_killed_parent(corpus):
    config_of(corpus)
    script = textwrap.dedent("""
        import sys
        sys.path[:0] = sys.argv[1:]
        from test_prepare_executors import SLOW, config_of, prepare
        from pathlib import Path
        made = prepare.make_plan
        prepare.make_plan = lambda data, splits, **keys: made(
            data.model_copy(update={"part_bytes": 4000}), splits, **keys)
        prepare.prepare_data(config_of(Path.cwd(), workers=2, **SLOW))
    """)
    here = Path(__file__).parent
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(here), str(here / "data")], cwd=corpus, start_new_session=True
    )
    workers = waiting_workers(corpus, 2)
    parents = {int(Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[1]) for one in workers}
    parent.kill()
    parent.wait()
    everyone = {*workers, *parents} - {os.getpid(), 1}
    for _ in range(200):
        if not any(map(is_alive, everyone)):
            break
        time.sleep(0.05)
    assert not any(map(is_alive, everyone))


def test_what_a_worker_refuses_is_said_as_the_caller_would_say_it(corpus):
    (corpus / "b.jsonl").write_text('{"body": 1}\n' * 2000)
    config = run_config(corpus, train=[str(corpus / "b.jsonl")], workers=2)
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    with pytest.raises(ValueError, match=r"data\.text_field.* the fields are: body"):
        prepare_data(config)


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ({"kind": "local", "options": {"time": "1:00:00"}}, "options: `time` has no effect on this machine"),
        ({"kind": "slurm", "options": {"partition": "cpu"}}, "options: `time` is missing; slurm needs time"),
        (
            {"kind": "slurm", "options": {"time": "1:00", "partition": "cpu", "cpus_per_taks": 2}},
            r"no parameter `cpus_per_taks`; did you mean cpus_per_task\?",
        ),
        (
            {"kind": "slurm", "options": {"time": "1:00", "partition": "cpu", "cpus_per_task": "two"}},
            r"options\.cpus_per_task: 'two' does not fit int",
        ),
        ({"kind": "slurm", "options": {"time": "1:00", "partition": "cpu", "tasks": 3}}, "no parameter `tasks`"),
        ({"kind": "ray", "options": {"mem_per_cpu_gb": "much"}}, r"mem_per_cpu_gb: 'much' does not fit float"),
    ],
)
def test_options_are_compared_with_datatroves(corpus, executor, message):
    with pytest.raises(ValueError, match=message):
        check_data(config_of(corpus, executor=executor))


def test_a_cluster_that_is_not_here_is_said_so(corpus, monkeypatch):
    monkeypatch.setenv("PATH", str(corpus))
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    slurm = {"kind": "slurm", "options": {"time": "1:00", "partition": "cpu"}}
    with pytest.raises(ValueError, match="the command `sbatch`, which is not here; run this on a login node"):
        check_data(config_of(corpus, executor=slurm))
    with pytest.raises(ValueError, match=r"ray is not installed; install it with: pip install 'ray\[default\]'"):
        check_data(config_of(corpus, executor="ray"))


SBATCH = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
place = Path("{folder}")
script = sys.argv[-1]
text = Path(script).read_text()
jobs = place / "jobs"
number = int(jobs.read_text()) + 1 if jobs.exists() else 1
if "merge_stats" not in text:
    jobs.write_text(str(number))
    if not (place / "busy").exists():
        last = int(re.search(r"--array=0-(\\d+)", text)[1])
        for task in range(last + 1):
            environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", RUN_OFFSET="0")
            subprocess.run(["bash", script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job", number)
"""


@pytest.fixture
def cluster(corpus, monkeypatch):
    """A stand-in for Slurm on the PATH: jobs run at once, or never while the file `busy` is there."""
    folder = corpus / "bin"
    folder.mkdir()
    commands = {
        "sbatch": SBATCH.format(python=sys.executable, folder=corpus),
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
        "squeue": f'#!/bin/bash\nif [ -e "{corpus}/busy" ]; then echo RUNNING; echo PENDING; fi\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{folder}:{python}:{os.environ['PATH']}")
    return {"kind": "slurm", "options": {"time": "1:00:00", "partition": "cpu", "tasks_per_job": 50, "qos": ""}}


def test_slurm_submits_and_the_same_call_collects(corpus, cluster):
    steps = {"dedup": "exact", "filters": [{"name": "RegexFilter", "parameters": {"regex_exp": "1[0-9] "}}]}
    here = prepare_data(config_of(corpus, "here", workers=1, **steps))
    config = config_of(corpus, "there", executor=cluster, **steps)
    with pytest.raises(SubmittedError, match=r"^submitted \d+ parts to Slurm as job 1 .*Run the same command again"):
        prepare_data(config)
    there = prepare_data(config)
    assert read_manifest(there, "data").files == read_manifest(here, "data").files
    assert documents(there, "train")
    assert not (config.directory / "data.unfinished").exists()
    assert (corpus / "jobs").read_text() == "1"


def test_a_job_that_is_under_way_is_not_submitted_again(corpus, cluster):
    config = config_of(corpus, executor=cluster)
    (corpus / "busy").touch()
    with pytest.raises(SubmittedError, match=r"^submitted"):
        prepare_data(config)
    with pytest.raises(SubmittedError, match=r"job 1 is under way \(PENDING, RUNNING\); 0 of \d+ parts are finished"):
        prepare_data(config)
    assert (corpus / "jobs").read_text() == "1"
    (corpus / "bin" / "squeue").unlink()
    with pytest.raises(SubmittedError, match="there is no `squeue` here"):
        prepare_data(config)
    (corpus / "bin" / "squeue").write_text("#!/bin/bash\necho invalid job id >&2\nexit 1\n")
    (corpus / "bin" / "squeue").chmod(0o755)
    (corpus / "busy").unlink()
    with pytest.raises(SubmittedError, match=r"^job 1 is over, and only 0 of .*logs-1.*submitted \d+ parts .* job 2"):
        prepare_data(config)
    assert documents(prepare_data(config), "train")


def test_a_trial_is_done_at_once_on_this_machine(corpus, cluster):
    config = config_of(corpus, executor=cluster, workers=1)
    assert documents(prepare_data(config, max_bytes=2000), "train")
    assert not (corpus / "jobs").exists()


def test_a_job_that_slurm_refuses_is_an_error(corpus, cluster):
    (corpus / "bin" / "sbatch").write_text("#!/bin/bash\nexit 3\n")
    with pytest.raises(ValueError, match=r"`sbatch` refused the job \(exit code 3\).*mend data\.executor\.options"):
        prepare_data(config_of(corpus, executor=cluster))


RAY = """
from . import exceptions, util
from ._references import Reference
up = False
def is_initialized(): return up
def init():
    global up
    up = True
def put(value): return value
def get(some):
    if isinstance(some, list): return [get(one) for one in some]
    if some.error is not None: raise some.error
    return some.value
def wait(some, num_returns, timeout): return some[:num_returns], some[num_returns:]
def cancel(one): pass
def kill(one): pass
class Method:
    def __init__(self, bound): self.bound = bound
    def remote(self, *arguments):
        try: return Reference(self.bound(*arguments))
        except (ValueError, OSError) as error: return Reference(None, error)
class Actor:
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return Method(getattr(self.inner, name))
class Remote:
    def __init__(self, kind): self.kind = kind
    def options(self, **options): assert options["num_cpus"] == 2; return self
    def remote(self): return Actor(self.kind())
def remote(kind): return Remote(kind)
"""
RAY_UTIL = """
from ._references import Reference
class Group:
    def ready(self): return Reference(True)
def placement_group(bundles): return Group()
def remove_placement_group(group): pass
def get_node_ip_address(): return "localhost"
"""


@pytest.fixture
def ray(corpus, monkeypatch):
    """A stand-in for Ray on the path, found by datatrove as the package is."""
    folder = corpus / "site" / "ray"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(RAY)
    (folder / "util.py").write_text(RAY_UTIL)
    names = ("ObjectLostError", "RayActorError", "TaskCancelledError", "WorkerCrashedError")
    (folder / "exceptions.py").write_text("".join(f"class {name}(Exception): pass\n" for name in names))
    (folder / "_references.py").write_text(
        "class Reference:\n    def __init__(self, value, error=None): self.value, self.error = value, error\n"
    )
    information = corpus / "site" / "ray-2.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.0\n")
    monkeypatch.syspath_prepend(str(corpus / "site"))
    from datatrove.utils import _import_utils

    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    _import_utils._is_package_available.cache_clear()
    _import_utils._is_distribution_available.cache_clear()
    yield {"kind": "ray", "options": {"cpus_per_task": 2, "tasks_per_job": 4}}
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        del sys.modules[name]
    _import_utils._is_package_available.cache_clear()
    _import_utils._is_distribution_available.cache_clear()


def test_ray_gives_the_same(corpus, ray):
    here = prepare_data(config_of(corpus, "here", workers=1))
    there = prepare_data(config_of(corpus, "there", executor=ray))
    assert read_manifest(there, "data").files == read_manifest(here, "data").files


def test_parts_that_failed_on_ray_are_said(corpus, ray):
    (corpus / "b.jsonl").write_text('{"body": 1}\n' * 2000)
    config = run_config(corpus, train=[str(corpus / "b.jsonl")], executor=ray)
    write_tokenizer(config.directory / "tokenizer", "gpt2")
    with pytest.raises(ChildProcessError, match=r"parts are not finished, the first is `train-00000`; see `.*logs`"):
        prepare_data(config)
