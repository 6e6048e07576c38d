"""Checkpoints: exact, whole after a stop of any kind, and refused if a single bit is not what was written."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dno.errors import UserError
from dno.runs.checkpoints import OtherVersion, load_newest, save_checkpoint
from dno.runs.files import write_whole

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
may_mount = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def tmp_path(tmp_path):
    """In memory if possible: an fsync takes long on a busy disk, and there are thousands here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def refused(*words, kind=UserError):
    with pytest.raises(UserError) as error:
        yield
    message = str(error.value)
    assert type(error.value) is kind, repr(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def save(run, step, keep=9, size=16):
    """A checkpoint that `check` can tell from all others."""
    tensors = {"noise": torch.full((size,), float(step)), "moment": torch.full((3,), step, dtype=torch.float64)}
    return save_checkpoint(run, step, tensors, {"step": step}, keep)


def check(checkpoint):
    assert checkpoint.state == {"step": checkpoint.step} and checkpoint.tensors.keys() == {"noise", "moment"}
    assert all((tensor == checkpoint.step).all() for tensor in checkpoint.tensors.values())
    return checkpoint


def path_of(run, step):
    return run / "checkpoints" / f"{step:06d}.safetensors"


def names(run):
    return sorted(path.name.removesuffix(".safetensors") for path in (run / "checkpoints").iterdir())


def newest(run, *reports):
    """The newest checkpoint; exactly these lines must be reported."""
    lines = []
    checkpoint = check(load_newest(run, lines.append))
    assert len(lines) == len(reports) and not any("\n" in line for line in lines), lines
    for line, words in zip(lines, reports, strict=True):
        assert all(word in line for word in words), (line, words)
    return checkpoint


def line_of(*words):
    return ("checkpoint 000020 is damaged (", *words, "); using 000010")


def sealed(data):
    """The bytes with the digest that fits them, as someone with bad intent would make it."""
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest.encode(), 1)


def forged(**metadata):
    """The bytes of a checkpoint of step 20 with other metadata; None leaves an entry out."""
    metadata = {"format": "2", "step": "20", "state": '{"step": 20}', "sha256": "0" * 64, **metadata}
    return sealed(safetensors.torch.save({}, {k: v for k, v in metadata.items() if v is not None}))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def two(tmp_path):
    """A run with the checkpoints 10 and 20."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


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
        "sha256": torch.zeros(64), "nan": torch.tensor([float("nan"), float("inf")]).half(),
    }  # fmt: skip
    state = {
        "inf": [float("inf"), -float("inf")], "zero": -0.0, "third": 1 / 3, "big": 2**70, "none": None, "yes": True,
        "pair": (1, 2), "text": "weiße Ente 鸭 \n\0", "deep": {"a": [{"b": []}]}, "sha256": "0" * 64,
        "quoted": '"sha256":"' + "0" * 64 + '"',
    }  # fmt: skip
    path = save_checkpoint(tmp_path, 10, tensors, {**state, "nan": float("nan")}, 2)
    assert path == path_of(tmp_path, 10) and os.listdir(tmp_path / "checkpoints") == ["000010.safetensors"]
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


def test_any_safetensors_reader_can_read_it(tmp_path):
    path = save(tmp_path, 20)
    assert (safetensors.torch.load_file(path)["noise"] == 20).all()
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    sha256, data = metadata.pop("sha256"), path.read_bytes()
    assert metadata == {"format": "2", "step": "20", "state": '{"step": 20}'}
    assert hashlib.sha256(data.replace(sha256.encode(), b"0" * 64)).hexdigest() == sha256


def test_no_tensors_and_a_step_of_seven_digits(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["1000000", "999999"] and newest(tmp_path).step == 1_000_000
    save_checkpoint(tmp_path, 1_000_001, {}, {}, 1)
    assert load_newest(tmp_path).tensors == {} and names(tmp_path) == ["1000001"]


def test_only_the_newest_are_kept_and_only_our_files_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    strangers = [
        "000000-mine.safetensors", "notes.txt", "12345.safetensors", "0000001.safetensors", "000003.txt", "000004",
        "٠٠٠٠٠١.safetensors", ".000001.safetensors.part", ".000001.safetensors.1.part", ".notes.1-abcdef01.part",
        ".000001.safetensors.1-abcdef01.part.txt", "x.000001.safetensors.1-abcdef01.part",
    ]  # fmt: skip
    for name in strangers:
        (folder / name).write_text("mine")
    for name in ("000001.safetensors", "000030.safetensors", ".000005.safetensors.1-abcdef01.part", "000006"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("mine")
    (tmp_path / "elsewhere").write_text("mine")
    for name in ("000002.safetensors", ".000007.safetensors.1-abcdef01.part"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    (folder / ".000008.safetensors.123-abcdef09.part").write_text("left by a process that was killed")
    for step in (10, 20, 100):
        save(tmp_path, step, keep=2)
    assert contents(tmp_path).keys() == before.keys() | {path_of(tmp_path, 20), path_of(tmp_path, 100)}
    save(tmp_path, 110, keep=1)
    assert newest(tmp_path).step == 110
    assert contents(tmp_path) == before | {path_of(tmp_path, 110): path_of(tmp_path, 110).read_bytes()}
    assert os.readlink(folder / ".000007.safetensors.1-abcdef01.part") and os.readlink(folder / "000002.safetensors")


def test_what_is_newer_than_the_checkpoint_just_written_is_removed(tmp_path):
    """The run went back: counted among those kept, a damaged newer one would push out a good one."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    path_of(tmp_path, 30).write_bytes(b"")
    save(tmp_path, 25, keep=2)
    assert names(tmp_path) == ["000020", "000025"]


def test_an_older_one_that_cannot_be_removed_is_no_error(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def unlink(path, *args, unlink=os.unlink, **kwargs):
        if Path(path).name == "000010.safetensors":
            raise PermissionError(13, "Permission denied")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["000010", "000020"] and newest(tmp_path).step == 20


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power failure there is the old file or the new one, never a name without its bytes."""
    (tmp_path / "run").mkdir()
    path, synced = path_of(tmp_path / "run", 10), {}

    def fsync(handle, fsync=os.fsync):
        status = os.fstat(handle)
        synced[status.st_ino] = (path.exists(), status.st_size)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path / "run", 10)
    assert synced[path.stat().st_ino] == (False, path.stat().st_size)
    if os.name != "nt":
        assert synced[path.parent.stat().st_ino][0] and path.parents[1].stat().st_ino in synced


# Damage.


def test_a_flipped_bit_anywhere(two):
    path = path_of(two, 20)
    with open(path, "r+b") as file:
        good = file.read()
        for offset in range(len(good)):
            for bit in range(8):
                file.seek(offset)
                file.write(bytes([good[offset] ^ 1 << bit]))
                file.flush()
                assert newest(two, line_of()).step == 10, (offset, bit)
            file.seek(offset)
            file.write(good[offset : offset + 1])
    assert newest(two).step == 20


def test_cut_at_any_length_longer_or_zeros(two):
    path = path_of(two, 20)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert newest(two, line_of("cut short")).step == 10, length
    for bad in (good + b"x", good + good, bytes(len(good)), b"x" * len(good)):
        path.write_bytes(bad)
        assert newest(two, line_of()).step == 10


def test_replaced_by_something_else_or_missing(two):
    path = path_of(two, 20)
    path.unlink()
    assert newest(two).step == 10
    path.symlink_to(two / "nowhere")
    assert newest(two, line_of("not a regular file")).step == 10
    path.unlink()
    path.symlink_to(path_of(two, 10))
    assert newest(two, line_of("not a regular file")).step == 10
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)  # to open one would wait for ever
        assert newest(two, line_of("not a regular file")).step == 10
        path.unlink()
    path.mkdir()
    assert newest(two, line_of("not a regular file")).step == 10
    with refused(f"cannot write {path}", "move away what is there", "are kept"):
        save(two, 20)
    assert names(two) == ["000010", "000020"]


def test_sizes_are_not_believed(two):
    """What a header claims, or a file of a terabyte without anything in it, is never allocated or read."""
    path = path_of(two, 20)
    good = path.read_bytes()
    claim = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**60, 2**62)
    for bad in (
        struct.pack("<Q", 2**64 - 1) + good[8:], struct.pack("<Q", 2**40) + good[8:], struct.pack("<Q", len(good)),
        struct.pack("<Q", len(claim)) + claim, struct.pack("<Q", 90_000_000) + b"[" * 1000,
    ):  # fmt: skip
        path.write_bytes(bad)
        assert newest(two, line_of("cut short")).step == 10
    for start in (b"", good, struct.pack("<Q", 2**39) + b"[" * 100) if os.name != "nt" else ():  # not sparse there
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(2**40)
        assert newest(two, line_of("cut short")).step == 10


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": None}, {"step": None}, {"state": None}, {"sha256": None}, {"sha256": ""}, {"sha256": "1" * 64},
        {"format": "1"}, {"format": "two"}, {"format": "1" * 5000}, {"format": "\n\x1b[2J"}, {"step": "30"},
        {"step": "-20"}, {"state": ""}, {"state": "{"}, {"state": "[" * 100_000}, {"state": "1" * 5000},
    ],
    ids=lambda metadata: str(metadata)[:40],
)  # fmt: skip
def test_metadata_that_is_not_of_a_checkpoint(two, metadata):
    path_of(two, 20).write_bytes(forged(**metadata))
    assert newest(two, line_of()).step == 10
    path_of(two, 20).write_bytes(safetensors.torch.save({"noise": torch.zeros(3)}))
    assert newest(two, line_of()).step == 10


def test_a_forged_header(two):
    """Its digest fits, its tensors do not."""
    metadata = {"format": "2", "step": "20", "state": "{}", "sha256": "0" * 64}
    data = safetensors.torch.save({"a": torch.zeros(4)}, metadata)
    for bad in (b"I64", b"F3\n", rb"\n2"):
        path_of(two, 20).write_bytes(sealed(data.replace(b"F32", bad)))
        assert newest(two, line_of("not a safetensors file")).step == 10
    path_of(two, 20).write_bytes(sealed(data))
    assert load_newest(two, pytest.fail).step == 20  # so the digests did fit


def test_the_name_says_another_step(two):
    path_of(two, 20).rename(path_of(two, 30))
    assert newest(two, ("checkpoint 000030 is damaged (not of format 2 and step 30); using 000010",)).step == 10


def test_each_damaged_one_is_a_warning_by_default(two):
    save(two, 30)
    for step in (20, 30):
        data = bytearray(path_of(two, step).read_bytes())
        data[-1] ^= 1
        path_of(two, step).write_bytes(data)
    with pytest.warns(UserWarning) as caught:
        assert check(load_newest(two)).step == 10
    assert [str(warning.message) for warning in caught] == [
        f"checkpoint {name} is damaged (sha256 differs); using 000010" for name in ("000030", "000020")
    ]


def test_an_older_damaged_one_is_not_looked_at(two):
    path_of(two, 10).write_bytes(b"")
    assert newest(two).step == 20


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "pickled state"])
def test_a_pickle_is_refused_and_never_run(two, kind):
    """Even if its digest fits."""
    ran, data = two / "ran", io.BytesIO()
    if kind == "torch":
        torch.save({"noise": Code(ran)}, data)
    else:
        pickle.dump({"noise": Code(ran)}, data, protocol=0)
    data = data.getvalue()
    path_of(two, 20).write_bytes(forged(state=data.decode()) if kind == "pickled state" else data)
    words = "not a checkpoint" if kind == "pickled state" else "not a safetensors file"
    assert newest(two, line_of(words)).step == 10
    assert not ran.exists()
    pickle.loads(data) if kind != "torch" else torch.load(io.BytesIO(data), weights_only=False)
    assert ran.exists()  # so it was a real one


def test_a_state_that_looks_like_code_is_plain_data(tmp_path):
    state = {"__class__": "os.system", "py/object": "builtins.exec", "x": "__import__('os').abort()"}
    save_checkpoint(tmp_path, 1, {}, state, 1)
    assert load_newest(tmp_path).state == state


# Of other versions.


def test_a_newer_format_is_not_damage(two):
    save(two, 30)
    path_of(two, 20).write_bytes(forged(format="3"))
    assert newest(two).step == 30
    path_of(two, 30).unlink()
    with refused(f"{path_of(two, 20)} was made by a newer version (format 3, this is 2); update", kind=OtherVersion):
        load_newest(two, pytest.fail)
    path_of(two, 20).write_bytes(forged(format="2").replace(b'"format":"2"', b'"format":"3"'))  # a flipped bit
    assert newest(two, line_of("sha256 differs")).step == 10


@pytest.mark.parametrize("name", ["000010", "1000000", ".000010.old"])
def test_a_run_of_the_earlier_format_is_refused_and_left_alone(tmp_path, name):
    folder = tmp_path / "checkpoints" / name
    folder.mkdir(parents=True)
    for file in ("tensors.safetensors", "state.json", "manifest.json"):
        (folder / file).write_text("{}")
    before = contents(tmp_path)
    advice = f"start a new run with --noise {tmp_path / 'best_noise.safetensors'}"
    with refused(f"{tmp_path} was made by an earlier version", advice, kind=OtherVersion):
        load_newest(tmp_path, pytest.fail)
    assert contents(tmp_path) == before


# Nothing to resume from: four different lines.


def test_there_is_no_such_folder_or_it_is_not_of_a_run(tmp_path):
    with refused(f"{tmp_path / 'typo'} does not exist"):
        load_newest(tmp_path / "typo")
    with refused(f"{tmp_path} is not a run folder", "args.json"):
        load_newest(tmp_path)
    (tmp_path / "args.json").write_text("{}")
    with refused(f"{tmp_path} has no checkpoint"):
        load_newest(tmp_path)
    with refused("args.json is not a run folder"):
        load_newest(tmp_path / "args.json")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".000010.safetensors.1-abcdef01.part").touch()
    with refused(f"{tmp_path} has no checkpoint"):
        load_newest(tmp_path)
    path_of(tmp_path, 10).touch()
    with refused("every checkpoint in", "is damaged: 000010 (cut short"):
        load_newest(tmp_path)


def test_all_are_damaged(two):
    path_of(two, 10).write_bytes(path_of(two, 20).read_bytes())
    path_of(two, 20).write_bytes(b"")
    with refused("damaged: 000020 (cut short", "000010 (not of format 2 and step 10)", "; start a new run"):
        load_newest(two, pytest.fail)


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
        if event in ("os.mkdir", "os.rename", "os.remove", "fsync") or event == "open" and args[1] in ("w", "x"):
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
    os.write(1, b"pid %d\\n" % pid)  # in one piece and first, because the child writes there too
    os.write(ready, b"x")
    os.close(begin), os.close(ready)
    os.write(1, b"end %d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(scope="module")
def saver():
    """Saves steps in a process of its own, and kills it: some seconds after the first, or before a file operation.

    It returns the steps whose saving had returned, and the exit status.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
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
    """The newest whose saving had returned is there, or the one that was being written; and the run can resume."""
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
            (run / "checkpoints" / ".000015.safetensors.1-abcdef01.part").write_bytes(
                path_of(run, 10).read_bytes()[:100]
            )
        done, code = saver(run, [step, step + 1], keep=keep, kill_at=kill_at)
        if case == "first" and not path_of(run, 20).exists():
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
    assert code == 0 and done == [step] and kill_at >= 4  # open, fsync, rename, fsync of the folder
    assert seen == ({20} if case == "first" else {10, step})


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here")
def test_ctrl_c_at_any_moment(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    generator, last, inside = random.Random(6), 0, 0
    save(tmp_path, last)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for step in range(1, 200):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 3e-3))
                save(tmp_path, step, size=200_000)
                signal.setitimer(signal.ITIMER_REAL, 0)
                last = step
            except KeyboardInterrupt:
                inside += 1
                found = newest(tmp_path).step
                assert found in (last, step)
                last = found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert inside >= 20
    save(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["000200"]


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


def free(disk):
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


@pytest.mark.parametrize("step", [10, 20])
def test_a_full_disk(tmp_path, step):
    """With any room left, up to one page less than is needed; with step 10 the checkpoint is written again."""
    with small_disk(tmp_path / "disk") as run:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / ".000007.safetensors.1-abcdef01.part").write_bytes(
            bytes(900_000)
        )  # a killed process left it
        save(run, 10, size=60_000)
        before, needed = contents(run), (1 << 20) - free(run)
        for room in (0, 4096, 8192, needed // 8192 * 4096, needed - 8192, needed - 4096):
            filler = run / "filler"
            filler.write_bytes(bytes(free(run) - room))
            assert free(run) == room
            with refused(f"cannot write {path_of(run, step)}", "No space left", "free some space", "are kept"):
                save(run, step, keep=1, size=60_000)
            filler.unlink()
            assert contents(run) == before and names(run) == ["000010"]
            assert newest(run).step == 10
        (run / "filler").write_bytes(bytes(free(run) - needed))
        save(run, step, keep=1, size=60_000)
        assert newest(run).step == step and names(run) == [f"{step:06d}"]


def test_a_disk_without_room_for_a_name(tmp_path):
    with small_disk(tmp_path / "disk", "size=1m,nr_inodes=20") as run:
        save(run, 10)
        fillers = [run / f"filler{index}" for index in range(os.statvfs(run).f_favail)]
        for filler in fillers:
            filler.touch()
        with refused("cannot write", "No space left", "free some space"):
            save(run, 20)
        assert names(run) == ["000010"] and newest(run).step == 10
        fillers[0].unlink()
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


def test_a_read_only_disk(tmp_path):
    with small_disk(tmp_path / "disk") as run:
        save(run, 10)
        (run / "checkpoints" / ".000020.safetensors.1-abcdef01.part").touch()  # killed just there
        before = contents(run)
        subprocess.run(["mount", "-o", "remount,ro", run], check=True)
        with refused(f"cannot write {path_of(run, 20)}", "Read-only file system", "make the folder writable"):
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
    with refused(f"cannot write {path_of(tmp_path, 10)}", "File exists", "move away what is there"):
        save(tmp_path, 10)


def test_without_fsync_of_folders(two, monkeypatch):
    """Some network disks refuse to sync them."""

    def fsync(handle, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc here")
    monkeypatch.setattr(os, "fsync", fsync)
    save(two, 30)
    assert newest(two).step == 30


# The atomic writer.


def test_write_whole_replaces_a_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for fsync in (False, True):
        write_whole(path, b"%d" % fsync, fsync)
        assert contents(tmp_path) == {path: b"%d" % fsync}
    monkeypatch.setattr(os, "fsync", pytest.fail)
    write_whole(path, b"2")
    assert contents(tmp_path) == {path: b"2"}


def test_write_whole_that_fails_leaves_what_there_was(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"before")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TypeError):
        write_whole(path, "not bytes")
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", b"x")
    with pytest.raises(OSError):
        write_whole(tmp_path / "gone" / "file", b"x")
    assert contents(tmp_path) == {path: b"before"} and (tmp_path / "folder").is_dir()


def test_processes_that_write_the_same_file_do_not_meet(tmp_path):
    code = (
        "import sys, pathlib\nfrom dno.runs.files import write_whole\n"
        "for _ in range(300):\n    write_whole(pathlib.Path(sys.argv[1]), sys.argv[2].encode() * int(sys.argv[3]))"
    )
    path = tmp_path / "file"
    write_whole(path, b"a" * 200_000)
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, path, letter, size], cwd=ROOT)
        for letter, size in (("a", "200000"), ("b", "1"))
    ]
    while any(job.poll() is None for job in jobs):
        assert path.read_bytes() in (b"a" * 200_000, b"b")
    assert [job.returncode for job in jobs] == [0, 0] and list(contents(tmp_path)) == [path]
