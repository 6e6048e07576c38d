"""Checkpoints: exact, whole after every kind of stop, and refused where a single byte is not what was written."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from dno.errors import UserError
from dno.runs.checkpoints import FILES, load_newest, save_checkpoint
from dno.runs.files import write_whole

ALL_FILES = (*FILES, "manifest.json")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
may_mount = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount")


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where possible: each fsync of a busy disk takes long, and there are thousands here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def refused(*words):
    with pytest.raises(UserError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def save(run, step, keep=9, size=16):
    """A checkpoint that can be told from all others, by `check`."""
    tensors = {"noise": torch.full((size,), float(step)), "moment": torch.full((3,), step, dtype=torch.float64)}
    return save_checkpoint(run, step, tensors, {"step": step}, keep)


def check(checkpoint, step=None):
    assert checkpoint.step == (checkpoint.step if step is None else step)
    assert checkpoint.state == {"step": checkpoint.step} and checkpoint.tensors.keys() == {"noise", "moment"}
    assert all((tensor == checkpoint.step).all() for tensor in checkpoint.tensors.values())
    return checkpoint


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(run, *reports):
    """The newest checkpoint; exactly these lines must be reported."""
    lines = []
    checkpoint = check(load_newest(run, lines.append))
    assert len(lines) == len(reports) and not any("\n" in line for line in lines), lines
    for line, words in zip(lines, reports, strict=True):
        assert all(word in line for word in words), (line, words)
    return checkpoint


def seal(path):
    """Make a manifest fit whatever lies in the folder, as somebody with bad intent would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in FILES:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


# What is written is read back.


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_a_round_trip_keeps_every_bit(tmp_path):
    odd = torch.tensor([0x7FC12345, -0x3ABCDF, 0x7F800000, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    wide = torch.randn(2, 3, 4, dtype=torch.float64)
    tensors = {
        "odd": odd, "wide": wide, "turned": wide.permute(2, 0, 1), "again": wide, "part": wide[:, 1],
        "step": torch.tensor(7.0), "count": torch.tensor([2**62 + 1, -1]), "half": torch.randn(3).bfloat16(),
        "none": torch.zeros(0, 4), "flags": torch.tensor([True, False]), "free": torch.ones(2, requires_grad=True),
    }  # fmt: skip
    state = {
        "inf": [float("inf"), -float("inf")], "zero": -0.0, "third": 1 / 3, "big": 2**70, "none": None, "yes": True,
        "pair": (1, 2), "text": "weiße Ente 鸭 \n\0", "deep": {"a": [{"b": []}]},
    }  # fmt: skip
    path = save_checkpoint(tmp_path, 10, tensors, {**state, "nan": float("nan")}, 2)
    assert path == tmp_path / "checkpoints" / "000010" and sorted(os.listdir(path)) == sorted(ALL_FILES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = load_newest(str(tmp_path))
    assert (checkpoint.step, checkpoint.path) == (10, path)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = checkpoint.tensors[name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape and bits(got) == bits(tensor.detach()), name
        got.zero_()  # it is the reader's own
    nan = checkpoint.state.pop("nan")
    assert nan != nan and checkpoint.state == {**state, "pair": [1, 2]}
    assert str(checkpoint.state["zero"]) == "-0.0" and list(checkpoint.state) == list(state)


def test_the_manifest_says_what_there_is(tmp_path):
    path = save(tmp_path, 20)
    files = {name: (path / name).read_bytes() for name in FILES}
    assert json.loads((path / "manifest.json").read_text()) == {
        "format": 1,
        "step": 20,
        "files": {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()},
    }


def test_no_tensors_and_a_step_of_seven_digits(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["1000000", "999999"] and newest(tmp_path).step == 1_000_000
    save_checkpoint(tmp_path, 1_000_001, {}, {}, 1)
    assert load_newest(tmp_path).tensors == {} and names(tmp_path) == ["1000001"]


def test_only_the_newest_stay_and_only_own_folders_go(tmp_path):
    strangers = ["000000-mine", "notes", "12345", "0000001", ".000001.party", "x.000001.part", "٠٠٠٠٠١"]
    for name in strangers:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "000001").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints" / "000002").symlink_to(tmp_path / "elsewhere")
    strangers += ["000001", "000002"]
    for step in (10, 20, 100):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == sorted([*strangers, "000020", "000100"])
    save(tmp_path, 110, keep=1)
    assert names(tmp_path) == sorted([*strangers, "000110"]) and newest(tmp_path).step == 110


def test_what_is_newer_than_the_checkpoint_written_last_goes(tmp_path):
    """The run went back: counted among those kept, a damaged newer one would push out a good one."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "000030" / "manifest.json").unlink()
    save(tmp_path, 25, keep=2)
    assert names(tmp_path) == ["000020", "000025"]


def test_an_older_one_that_cannot_be_removed_is_no_error(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def replace(source, target, replace=os.replace):
        if Path(source).name == "000010":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["000010", "000020"] and newest(tmp_path).step == 20


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order: each file fsynced, the manifest last, then the folder; the rename; its parent; only then removals."""
    save(tmp_path, 10)
    events = []

    def fsync(handle, fsync=os.fsync):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(f"fsync {path.name}")
        if path.is_file():
            assert path.stat().st_size > 0  # not left in Python's own buffer
        fsync(handle)

    def replace(source, target, replace=os.replace):
        events.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: events.append(f"remove {path.name}"))
    save(tmp_path, 20, keep=1)
    written = [f"fsync {name}" for name in ALL_FILES]
    assert events == [
        *written, "fsync .000020.part", ".000020.part -> 000020", "fsync checkpoints",
        "000010 -> .000010.part", "remove .000010.part",
    ]  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    events.clear()
    save(tmp_path, 20, keep=1)  # once more
    assert events == [
        *written, "fsync .000020.part", "000020 -> .000020.old", ".000020.part -> 000020", "fsync checkpoints",
        ".000020.old -> .000020.part",
    ]  # fmt: skip
    assert names(tmp_path) == ["000020"] and newest(tmp_path).step == 20
    events.clear()
    save(tmp_path / "new" if (tmp_path / "new").mkdir() else tmp_path / "new", 10)
    assert events[0] == "fsync new"  # the folder `checkpoints` itself


# Damage.


def flip(path, offset, mask):
    with open(path, "r+b") as file:  # in place: a file that is written anew each time waits for the disk
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def line_of(name, *words):
    return (f"checkpoint 000020 is damaged ({name}: ", *words, "); using 000010")


@pytest.fixture
def two(tmp_path):
    """A run with the checkpoints 10 and 20."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(two, name):
    path = two / "checkpoints" / "000020" / name
    for offset in range(path.stat().st_size):
        flip(path, offset, 1 << offset % 8)
        assert newest(two, line_of(name, "sha256 differs")).step == 10
        flip(path, offset, 1 << offset % 8)
    assert newest(two).step == 20


def test_a_flipped_byte_of_the_manifest(two):
    path = two / "checkpoints" / "000020" / "manifest.json"
    for offset in range(path.stat().st_size):
        for mask in (1, 0x80):
            flip(path, offset, mask)
            assert newest(two, ("checkpoint 000020 is damaged (", "); using 000010")).step == 10, offset
            flip(path, offset, mask)
    assert newest(two).step == 20


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_file_that_is_cut_longer_empty_missing_or_a_folder(two, name):
    path = two / "checkpoints" / "000020" / name
    good = path.read_bytes()
    size = f"{len(good)}" if name in FILES else ""
    for bad in (good[:-1], good[: len(good) // 2], b"", good + b"x", bytes(len(good))):
        path.write_bytes(bad)
        words = ["sha256 differs"] if len(bad) == len(good) else [f"{len(bad)} bytes, expected {size}"]
        assert newest(two, line_of(name, *(words if name in FILES else []))).step == 10
    path.unlink()
    assert newest(two, line_of(name, "No such file")).step == 10
    path.mkdir()
    assert newest(two, line_of(name)).step == 10


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "7", "{}", '"x"', "[" * 100_000, "1" * 5000, "\x00\x01", '{"format": 1}',
        '{"format": 1, "step": 20, "files": []}', '{"format": 1, "step": 20, "files": {}}',
        '{"format": 1, "step": 20, "files": {"tensors.safetensors": 1, "state.json": null}}',
        '{"format": 1, "step": 20, "files": {"tensors.safetensors": {}, "state.json": {}}}',
        '{"format": 1, "step": 20, "files": {"../../x": {}, "state.json": {}}}',
    ],
)  # fmt: skip
def test_a_manifest_of_garbage(two, text):
    (two / "checkpoints" / "000020" / "manifest.json").write_text(text)
    assert newest(two, line_of("manifest.json")).step == 10


def test_a_manifest_of_another_format_or_step(two):
    path = two / "checkpoints" / "000020" / "manifest.json"
    good = path.read_text()
    for version in ("2", '"1\\n\\u001b[2J' + "x" * 1000 + '"', "null"):
        path.write_text(good.replace('"format": 1', f'"format": {version}'))
        assert newest(two, line_of("manifest.json", "format ", ", expected 1")).step == 10
    path.write_text(good)
    path.parent.rename(two / "checkpoints" / "000030")
    assert newest(two, ("checkpoint 000030 is damaged (manifest.json: not of step 30",)).step == 10


def test_each_damaged_one_is_reported_by_default_as_a_warning(two):
    save(two, 30)
    for name in ("000020", "000030"):
        flip(two / "checkpoints" / name / "state.json", 0, 1)
    with pytest.warns(UserWarning) as caught:
        assert check(load_newest(two)).step == 10
    assert [str(warning.message) for warning in caught] == [
        f"checkpoint {name} is damaged (state.json: sha256 differs); using 000010" for name in ("000030", "000020")
    ]


def test_an_older_damaged_one_is_not_looked_at(two):
    shutil.rmtree(two / "checkpoints" / "000010")
    (two / "checkpoints" / "000010").mkdir()
    assert newest(two).step == 20


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "pickled state"])
def test_a_pickle_is_refused_and_never_run(two, kind):
    """Even where the manifest fits it."""
    path, ran = two / "checkpoints" / "000020", two / "ran"
    name = "state.json" if kind == "pickled state" else "tensors.safetensors"
    if kind == "torch":
        torch.save({"noise": Code(ran)}, path / name)
    else:
        (path / name).write_bytes(pickle.dumps({"noise": Code(ran)}))
    assert newest(two, line_of(name, " bytes, expected ")).step == 10
    seal(path)
    assert newest(two, line_of(name, "not what a checkpoint holds")).step == 10
    assert not ran.exists()
    data = io.BytesIO((path / name).read_bytes())
    pickle.load(data) if kind != "torch" else torch.load(data, weights_only=False)
    assert ran.exists()  # so it was a real one


def test_a_state_that_looks_like_code_is_plain_data(tmp_path):
    state = {"__class__": "os.system", "py/object": "builtins.exec", "x": "__import__('os').abort()"}
    save_checkpoint(tmp_path, 1, {}, state, 1)
    assert load_newest(tmp_path).state == state


# Nothing to continue from: four different lines.


def test_there_is_no_such_folder_or_it_is_no_run(tmp_path):
    with refused(f"{tmp_path / 'typo'} does not exist"):
        load_newest(tmp_path / "typo")
    with refused(f"{tmp_path} is not the folder of a run", "args.json"):
        load_newest(tmp_path)
    (tmp_path / "args.json").write_text("{}")
    with refused(f"{tmp_path} has no checkpoint"):
        load_newest(tmp_path)
    with refused("args.json is not the folder of a run"):
        load_newest(tmp_path / "args.json")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".000010.part").mkdir()
    with refused(f"{tmp_path} has no checkpoint"):
        load_newest(tmp_path)
    (tmp_path / "checkpoints" / "000010").mkdir()
    with refused("every checkpoint in", "is damaged: 000010 (manifest.json: No such file"):
        load_newest(tmp_path)


def test_all_are_damaged(two):
    flip(two / "checkpoints" / "000010" / "state.json", 3, 1)
    (two / "checkpoints" / "000020" / "tensors.safetensors").write_bytes(b"")
    reports = []
    with refused("damaged: 000020 (tensors.safetensors: 0 bytes, expected", "000010 (state.json: sha256 differs)"):
        load_newest(two, reports.append)
    assert not reports


# Killed.

SERVER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from dno.runs.checkpoints import save_checkpoint

def save(run, step, keep, size):
    tensors = {"noise": torch.full((size,), float(step)), "moment": torch.full((3,), step, dtype=torch.float64)}
    save_checkpoint(run, step, tensors, {"step": step}, keep)

def child(run, steps, keep, size, kill_at):
    def die_at_event(event, args):
        nonlocal kill_at
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync") or event == "open" and args[1] == "w":
            kill_at -= 1
            if kill_at < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    if kill_at is not None:
        fsync = os.fsync
        os.fsync = lambda handle: (die_at_event("fsync", ()), fsync(handle))
        sys.addaudithook(die_at_event)
    for step in steps:
        save(run, step, keep, size)
        os.write(1, b"%d\\n" % step)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    begin, ready = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(begin, 1)
        try:
            child(job["run"], range(*job["steps"]), job["keep"], job["size"], job["kill_at"])
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.write(1, b"pid %d\\n" % pid)  # in one piece and first, for the child writes there too
    os.write(ready, b"x")
    os.close(begin), os.close(ready)
    os.write(1, b"end %d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(scope="module")
def saver():
    """Saves steps in a process of its own, and kills it: so many seconds after the first, or before a file operation.

    It returns the steps whose saving had returned, and the exit status.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout.readline() == "ready\n"

        def save_and_die(run, steps, keep=2, size=16, seconds=None, kill_at=None):
            job = dict(run=str(run), steps=steps, keep=keep, size=size, seconds=seconds, kill_at=kill_at)
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            done = []
            for line in iter(server.stdout.readline, ""):
                if line.startswith("end"):
                    return done, int(line.split()[1])
                if line.startswith("pid"):
                    pid = int(line.split()[1])
                    continue
                done.append(int(line))
                if seconds is not None and len(done) == 1:
                    time.sleep(seconds)
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError("the server is gone")

        yield save_and_die
        server.stdin.close()


@needs_fork
def test_killed_at_any_moment(tmp_path_factory, saver):
    """The newest whose saving had returned is there, or the one that was being written; and the run can go on."""
    run = tmp_path_factory.mktemp("run")  # on a real disk, where most of the time is spent in writing
    generator, first, killed_inside = random.Random(6), 1, 0
    for trial in range(12):
        done, code = saver(run, [first, first + 10_000], size=100_000, seconds=generator.uniform(0, 0.06))
        assert code == -signal.SIGKILL and done == list(range(first, first + len(done)))
        killed_inside += any(name.startswith(".") for name in names(run))
        checkpoint = newest(run)  # nothing is reported: no damaged one has a final name
        assert checkpoint.step in (done[-1], done[-1] + 1), trial
        first = checkpoint.step + 1
    assert killed_inside >= 2
    save(run, first, keep=2)
    assert names(run) == [f"{first - 1:06d}", f"{first:06d}"]  # the leftovers are gone


@needs_fork
@pytest.mark.parametrize("case", ["first", "last one that stays", "again", "after a kill"])
def test_killed_at_each_file_operation(tmp_path, saver, case):
    step = 20 if case != "again" else 10
    keep = 1 if case == "last one that stays" else 2
    seen = set()
    for kill_at in range(200):
        run = tmp_path / str(kill_at)
        run.mkdir()
        (run / "args.json").write_text("{}")
        if case != "first":
            save(run, 10)
        if case == "after a kill":
            shutil.copytree(run / "checkpoints" / "000010", run / "checkpoints" / ".000005.part")
            (run / "checkpoints" / "000010").rename(run / "checkpoints" / ".000010.old")
        done, code = saver(run, [step, step + 1], keep=keep, kill_at=kill_at)
        if case == "first" and not (run / "checkpoints" / "000020").exists():
            with refused("has no checkpoint"):
                load_newest(run)
        else:
            seen.add(newest(run).step)
        if code == 0:
            break
        assert code == -signal.SIGKILL and not done
        save(run, 30, keep=2)
        assert set(names(run)) <= {"000010", "000020", "000030"} and len(names(run)) <= 2
        assert newest(run).step == 30
    assert code == 0 and done == [step] and kill_at >= 10
    assert seen == ({20} if case == "first" else {10, step})


# A disk that is full, read-only or gone.


@contextlib.contextmanager
def small_disk(path, options="size=1m"):
    path.mkdir()
    if not may_mount or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def free(disk):
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


@pytest.mark.parametrize("step", [10, 20])
def test_a_full_disk(tmp_path, step):
    """Of any room left, up to one page less than is needed; with step 10 the checkpoint is written again."""
    with small_disk(tmp_path / "disk") as run:
        save(run, 10, size=60_000)
        (run / "checkpoints" / ".000007.part").mkdir()  # what a killed process left
        (run / "checkpoints" / ".000007.part" / "tensors.safetensors").write_bytes(bytes(100_000))
        save(run, 10, size=60_000)
        before, needed = contents(run), (1 << 20) - free(run)
        for room in (0, 4096, 8192, needed // 8192 * 4096, needed - 8192, needed - 4096):
            filler = run / "filler"
            filler.write_bytes(bytes(free(run) - room))
            assert free(run) == room
            with refused(f"cannot write {run}/checkpoints/{step:06d}", "No space left", "free some space", "are kept"):
                save(run, step, keep=1, size=60_000)
            filler.unlink()
            assert contents(run) == before and names(run) == ["000010"]
            assert newest(run).step == 10
        (run / "filler").write_bytes(bytes(free(run) - needed))
        save(run, step, keep=1, size=60_000)
        assert newest(run).step == step and names(run) == [f"{step:06d}"]


def test_a_disk_without_room_for_names(tmp_path):
    """Room for bytes, but not for the folder and its three files."""
    with small_disk(tmp_path / "disk", "size=1m,nr_inodes=20") as run:
        save(run, 10)
        for room in range(4):
            fillers = [run / f"filler{index}" for index in range(os.statvfs(run).f_favail - room)]
            for filler in fillers:
                filler.touch()
            with refused("cannot write", "No space left", "free some space"):
                save(run, 20)
            assert names(run) == ["000010"] and newest(run).step == 10
            for filler in fillers:
                filler.unlink()
        save(run, 20)
        assert newest(run).step == 20


@pytest.mark.parametrize("room", [0, 1, 100, 200, 600])
def test_files_that_may_not_grow(two, room):
    """What a full disk looks like without root."""
    resource = pytest.importorskip("resource")
    before, limit = contents(two), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with refused("cannot write", "000030", "File too large", "free some space"):
            save(two, 30, keep=1, size=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(two) == before and names(two) == ["000010", "000020"]


@pytest.mark.parametrize("call", range(12))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_stopped_at_each_fsync_and_rename(tmp_path, monkeypatch, call, error):
    """The replaced checkpoint has its place back, and nothing is left over."""
    save(tmp_path, 10)
    before, left = contents(tmp_path), call

    def stop(function):
        def stopped(*args):
            nonlocal left
            left -= 1
            if left == -1:
                raise error
            return function(*args)

        return stopped

    monkeypatch.setattr(os, "fsync", stop(os.fsync))
    monkeypatch.setattr(os, "replace", stop(os.replace))
    try:
        save_checkpoint(tmp_path, 10, {}, {"new": True}, 1)
    except (UserError, KeyboardInterrupt):
        pass
    monkeypatch.undo()
    found = load_newest(tmp_path, pytest.fail)
    if call < 6:  # three files, the folder, two renames
        assert names(tmp_path) == ["000010"] and contents(tmp_path) == before
    else:
        assert found.state == {"new": True}
    save(tmp_path, 20)
    assert names(tmp_path) == ["000010", "000020"]


def test_a_read_only_disk(tmp_path):
    with small_disk(tmp_path / "disk") as run:
        save(run, 10)
        os.rename(run / "checkpoints" / "000010", run / "checkpoints" / ".000010.old")  # killed just there
        before = contents(run)
        subprocess.run(["mount", "-o", "remount,ro", run], check=True)
        with refused(f"cannot write {run}/checkpoints/000020", "Read-only file system", "make the folder writable"):
            save(run, 20)
        assert contents(run) == before and newest(run).step == 10
        with refused("cannot write", "Read-only file system"):
            save(run / "checkpoints", 20)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(two):
    (two / "checkpoints").chmod(0o555)
    try:
        with refused("cannot write", "000030", "Permission denied", "make the folder writable"):
            save(two, 30)
        assert newest(two).step == 20
    finally:
        (two / "checkpoints").chmod(0o755)


def test_the_folder_is_gone_or_a_file(tmp_path):
    with refused(f"cannot write {tmp_path / 'gone'}", "No such file", "must stay where it is"):
        save(tmp_path / "gone", 10)
    assert not (tmp_path / "gone").exists()
    (tmp_path / "checkpoints").write_text("")
    with refused(f"cannot write {tmp_path / 'checkpoints' / '000010'}", "File exists"):
        save(tmp_path, 10)


def test_without_fsync_of_folders(two, monkeypatch):
    """Windows cannot open folders, and some network disks refuse to sync them."""

    def fsync(handle, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    if os.path.exists("/proc/self/fd"):
        monkeypatch.setattr(os, "fsync", fsync)
        save(two, 30)
    assert newest(two).step == (30 if os.path.exists("/proc/self/fd") else 20)


# The helper for single files.


def test_write_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for fsync in (False, True):
        write_whole(path, b"%d" % fsync, fsync)
        assert path.read_bytes() == b"%d" % fsync
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_whole(path, b"2")
    assert not synced
    write_whole(path, b"3", fsync=True)
    assert len(synced) == 2

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"4")
    assert contents(tmp_path) == {path: b"3"}
