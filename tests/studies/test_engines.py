"""Engines: what runs the cells of a study. With commands of a few milliseconds in place of cells."""

from __future__ import annotations

import importlib.util
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from emformer.parts import Engine, UserError
from emformer.studies import jobs
from emformer.studies.engines import slurm, work
from emformer.studies.engines.local import Local
from emformer.studies.engines.slurm import Slurm
from emformer.studies.jobs import Event, Job, environment, last_line

WRITES = "import sys; open(sys.argv[1], 'a').write('x')"


def job(folder: Path, name: str, code: str = WRITES) -> Job:
    """A job of Python code, which is given the path of its `done` file."""
    done = folder / "finished" / name
    done.parent.mkdir(parents=True, exist_ok=True)
    return Job(name, (sys.executable, "-S", "-c", code, str(done)), folder / "logs" / f"{name}.txt", done)


def ran(engine: Engine, *jobs: Job) -> list[Event]:
    """What the engine tells of these jobs, but for the time that passes."""
    events: list[Event] = []
    engine.run(jobs, events.append)
    return [event for event in events if event.what != "waiting"]


def test_every_job_is_run_and_no_more_at_once_than_asked(tmp_path: Path):
    code = (
        "import os, sys, time; lot = os.path.dirname(sys.argv[1]) + '/on'; os.makedirs(lot, exist_ok=True);"
        "own = f'{lot}/{os.getpid()}'; open(own, 'w').close(); time.sleep(0.1); n = len(os.listdir(lot));"
        "os.remove(own); open(sys.argv[1], 'w').write(str(n))"
    )
    some = [job(tmp_path, f"job {k}", code) for k in range(5)]
    events = ran(Local(processes=2), *some)
    assert sorted(event.job for event in events if event.what == "finished") == [one.name for one in some]
    counts = [int(one.done.read_text()) for one in some]
    assert max(counts) == 2 and len(events) == 10


def test_a_job_that_is_done_is_not_run_again(tmp_path: Path):
    first, second = job(tmp_path, "first"), job(tmp_path, "second")
    first.done.write_text("kept")
    assert [(event.what, event.job) for event in ran(Local(), first, second)] == [("started", "second"), ("finished", "second")]
    assert first.done.read_text() == "kept" and second.done.read_text() == "x"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ValueError('the moon is full')", "ValueError: the moon is full"),
        ("import sys; print('emformer: choose another rank.\\n'); sys.exit(2)", "choose another rank."),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("print('all is well')", "all is well"),  # but nothing done
    ],
)
def test_a_job_that_fails_is_told_and_the_rest_goes_on(tmp_path: Path, code: str, why: str):
    bad, good = job(tmp_path, "bad", code), job(tmp_path, "good")
    events = ran(Local(processes=1), bad, good)
    assert events == [
        Event("started", "bad"),
        Event("failed", "bad", why),
        Event("started", "good"),
        Event("finished", "good"),
    ]


def test_a_program_that_is_not_there_fails_alone(tmp_path: Path):
    gone = job(tmp_path, "gone")._replace(command=("/nowhere/python",))
    events = ran(Local(processes=1), gone, job(tmp_path, "good"))
    assert [event.what for event in events] == ["failed", "started", "finished"]
    assert "cannot be started: No such file" in events[0].why


def test_a_killed_job_goes_on_once(tmp_path: Path):
    dies = "import os, sys; open(sys.argv[1] + '.times', 'a').write('x'); os.kill(os.getpid(), 9)"
    once = "import os, sys; p = sys.argv[1] + '.times'; open(p, 'a').write('x');"
    once += "os.kill(os.getpid(), 9) if os.path.getsize(p) == 1 else open(sys.argv[1], 'w').close()"
    always, first = job(tmp_path, "always", dies), job(tmp_path, "first", once)
    events = ran(Local(processes=1), always, first)
    assert [(event.what, event.job) for event in events if event.what != "started"] == [
        ("failed", "always"),
        ("finished", "first"),
    ]
    assert [event.why for event in events if event.what == "failed"] == ["killed by SIGKILL"]
    assert len(events) == 6 and Path(f"{always.done}.times").read_text() == "xx"


def test_what_is_done_counts_and_not_how_the_process_ended(tmp_path: Path):
    code = WRITES + "; import os; os.kill(os.getpid(), 9)"
    assert [event.what for event in ran(Local(), job(tmp_path, "one", code))] == ["started", "finished"]


PATIENT = """
import signal, sys, threading, os, time
from pathlib import Path
said = Path(sys.argv[1] + ".said")
signal.signal(signal.SIGTERM, lambda *_: (said.write_text("checkpoint"), os._exit(143)))
threading.Thread(target=lambda: (os.read(0, 1), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
Path(sys.argv[1] + ".on").write_text(str(os.getpid()))
time.sleep(30)
"""  # as a cell does: a checkpoint at SIGTERM, and at the end of stdin


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


def test_a_stop_ends_jobs_with_a_checkpoint(tmp_path: Path):
    one = job(tmp_path, "one", PATIENT)
    said, on = (Path(f"{one.done}.{end}") for end in ("said", "on"))

    def tell(event: Event) -> None:
        if event.what == "waiting" and on.exists() and on.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Local().run([one], tell)
    assert said.read_text() == "checkpoint"
    with pytest.raises(ProcessLookupError):
        os.kill(int(on.read_text()), 0)


def test_jobs_of_a_killed_process_stop_with_a_checkpoint(tmp_path: Path):
    one = job(tmp_path, "one", PATIENT)
    said, on = (Path(f"{one.done}.{end}") for end in ("said", "on"))
    pid = os.fork()
    if pid == 0:
        try:
            Local().run([one], lambda event: None)
        finally:
            os._exit(1)
    until(lambda: on.exists() and on.read_text())
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    until(said.exists)


def test_threads_and_the_place_in_a_cluster():
    found = environment(3, {"PATH": "/bin", "SLURM_PROCID": "4", "SLURM_NTASKS": "8", "OMP_NUM_THREADS": "64"})
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "3" and found["PATH"] == "/bin"
    assert not [name for name in found if name.startswith("SLURM")]
    assert Local(threads=10**6).at_once == 1 and Local(processes=3, threads=5).at_once == 3


def test_the_last_line_that_says_something(tmp_path: Path):
    log = tmp_path / "log.txt"
    assert last_line(log) == ""
    log.write_bytes(b"a" * 100_000 + b"\nemformer: no space left.\n \n")
    assert last_line(log) == "no space left."
    log.write_text("b" * 1000)
    assert last_line(log) == "b" * 300


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Local(processes=0), "0 processes of 1 threads are none"),
        (lambda: Local(threads=0), "None processes of 0 threads"),
        (lambda: Slurm(minutes=0), "minutes is 0; choose at least 1"),
        (lambda: Slurm(gpus=-1), "gpus is -1"),
    ],
)
def test_what_cannot_be_is_told(make: Callable[[], Engine], told: str):
    with pytest.raises(UserError, match=told):
        make()


def test_the_script_for_slurm(tmp_path: Path):
    engine = Slurm(partition="gpu", account="lab", minutes=90, cpus=4, gpus=1, memory_gb=16, at_once=3, more={"qos": "low"})
    script = engine.script([job(tmp_path, "a"), job(tmp_path, "b")])
    for line in (
        "#!/bin/bash",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --time=90",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --mem=16G",
        "#SBATCH --qos=low",
        "#SBATCH --array=0-1%2",
    ):
        assert line in script.splitlines(), line
    assert "submitit.core._submit" in script and "# 1: " in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "#SBATCH --gpus" not in Slurm().script([job(tmp_path, "a")])


def test_without_submitit_it_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"emformer\[sweep\]"):
        Slurm().script([job(tmp_path, "a")])
    with pytest.raises(UserError, match=r"emformer\[sweep\]"):
        Slurm().run([job(tmp_path, "a")], print)


def test_without_slurm_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no srun here"):
        Slurm().run([job(tmp_path, "a")], print)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent by value is sent without the checks of types that tests put around every function."""

    def plain(module: ModuleType) -> ModuleType:
        spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, found)
        spec.loader.exec_module(found)
        return found

    monkeypatch.setattr(slurm, "jobs_module", plain(jobs))
    monkeypatch.setattr(slurm, "work", plain(work))


def test_the_local_executor_of_submitit(tmp_path: Path, unchecked: None):
    good, bad = job(tmp_path, "good"), job(tmp_path, "bad", "raise ValueError('the moon is full')")
    done = job(tmp_path, "done")
    done.done.write_text("kept")
    events = ran(Slurm(cluster="local", cpus=2), good, bad, done)
    assert sorted(events) == [
        Event("failed", "bad", "ValueError: the moon is full"),
        Event("finished", "good"),
        Event("started", "bad"),
        Event("started", "good"),
    ]
    assert good.done.read_text() == "x" and done.done.read_text() == "kept"


def test_a_stop_ends_the_local_executor(tmp_path: Path, unchecked: None):
    one = job(tmp_path, "one", PATIENT)
    said, on = (Path(f"{one.done}.{end}") for end in ("said", "on"))

    def tell(event: Event) -> None:
        if event.what == "waiting" and on.exists() and on.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Slurm(cluster="local").run([one], tell)
    until(said.exists)


# A cluster of this machine: sbatch starts the tasks of an array, each as `srun` would; a job is a file in $QUEUE.
TASK = """#!/bin/bash
echo RUNNING > "$QUEUE/$1_$2"
SLURM_ARRAY_JOB_ID=$1 SLURM_ARRAY_TASK_ID=$2 SLURM_JOB_ID=9$2 SLURM_NTASKS=1 SLURM_PROCID=0 bash "$QUEUE/script"
[ -e "$QUEUE/again_$1_$2" ] && rm "$QUEUE/again_$1_$2" && exec setsid "$0" "$1" "$2"
rm -f "$QUEUE/$1_$2"
"""
PROGRAMS = {
    "task": TASK,
    "sbatch": """#!/bin/bash
cp "$1" "$QUEUE/script"; echo "$(date +%s%N)" >> "$QUEUE.sent"
last=$(sed -n 's/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for k in $(seq 0 $last); do echo PENDING > "$QUEUE/7_$k"; setsid task 7 $k > /dev/null 2>&1 & done
echo "Submitted batch job 7"
""",
    "srun": """#!/bin/bash
while [[ "$1" == --* ]]; do
  case "$1" in
    --error) err=${2//%A/7}; err=${err//%a/$SLURM_ARRAY_TASK_ID}; exec 2>> "${err//%t/0}"; shift;;
    --output) shift;;
  esac
  shift
done
exec "$@"
""",
    "squeue": """#!/bin/bash
[ -e "$QUEUE.down" ] && exit 1
cd "$QUEUE"; for one in [0-9]*_*; do [ -e "$one" ] && echo "$one $(cat "$one")"; done; exit 0
""",
    "scontrol": """#!/bin/bash
touch "$QUEUE/again_$2"
""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Path:
    programs, queue = tmp_path / "bin", tmp_path / "queue"
    programs.mkdir()
    queue.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(queue))
    monkeypatch.setattr(slurm, "ASK_EVERY", 0.3)
    return queue


def sent(queue: Path) -> int:
    """Arrays that were submitted."""
    return len(Path(f"{queue}.sent").read_text().splitlines())


def test_an_array_of_jobs(tmp_path: Path, cluster: Path):
    good, bad, third = job(tmp_path, "good"), job(tmp_path, "bad", "raise ValueError('the moon is full')"), job(tmp_path, "third")
    events = ran(Slurm(), good, bad, third)
    assert {event for event in events if event.what != "started"} == {
        Event("failed", "bad", "ValueError: the moon is full"),
        Event("finished", "good"),
        Event("finished", "third"),
    }
    assert sent(cluster) == 1 and good.done.read_text() == third.done.read_text() == "x"


def test_a_second_call_finds_what_is_queued(tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]):
    slow = "import time, sys; time.sleep(2.0); open(sys.argv[1], 'a').write('x')"
    both = [job(tmp_path, name, slow) for name in ("a", "b")]

    def tell(event: Event) -> None:
        if event.what == "started":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Slurm().run(both, tell)
    assert "scancel 7" in capsys.readouterr().err
    Path(f"{cluster}.down").touch()
    with pytest.raises(UserError, match="Slurm does not answer"):
        Slurm().run(both, print)
    Path(f"{cluster}.down").unlink()
    assert [event.what for event in ran(Slurm(), *both)].count("finished") == 2
    assert sent(cluster) == 1 and all(one.done.read_text() == "x" for one in both)


def test_a_job_that_is_taken_away_writes_a_checkpoint_and_goes_on(tmp_path: Path, cluster: Path):
    goes_on = "import sys, os\nif os.path.exists(sys.argv[1] + '.said'):\n open(sys.argv[1], 'a').write('x'); sys.exit()\n"
    one, other = job(tmp_path, "one", goes_on + PATIENT), job(tmp_path, "other")
    on, said = (Path(f"{one.done}.{end}") for end in ("on", "said"))

    def preempt() -> None:
        until(lambda: on.exists() and on.read_text())
        waits = Path(f"/proc/{on.read_text()}/stat").read_text().split()[3]  # the parent of the command
        os.kill(int(waits), signal.SIGUSR2)

    thread = threading.Thread(target=preempt)
    thread.start()
    events = ran(Slurm(), one, other)
    thread.join()
    assert [event for event in events if event.what == "failed"] == []
    assert said.read_text() == "checkpoint" and one.done.read_text() == "x" and sent(cluster) == 1


def test_jobs_that_vanish_are_told(tmp_path: Path, cluster: Path):
    (tmp_path / "bin" / "task").write_text('#!/bin/bash\nrm "$QUEUE/$1_$2"\n')
    events = ran(Slurm(), job(tmp_path, "a"), job(tmp_path, "b"))
    assert events == [
        Event("failed", name, f"the job 7_{k} has left the queue without a word") for k, name in enumerate(("a", "b"))
    ]


def test_a_refusal_of_slurm_is_told(tmp_path: Path, cluster: Path):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"Slurm took no jobs: .*invalid partition"):
        ran(Slurm(), job(tmp_path, "a"), job(tmp_path, "b"))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A log on it may hold nothing of what went wrong."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    events = ran(Local(), job(tmp_path, "one", "import sys; sys.exit(1)"))
    assert events[-1] == Event("failed", "one", "exit code 1 (the disk is full)")
