"""Runs the ranks of tests as `torchrun` would, forked from one process that has the libraries imported already.

Reads one JSON request per line, {"size", "flags", "cwd", "defaults", "environment"}; answers with {"pids"} when
the ranks are started and {"codes"} when all have ended. As under torchrun, the end of one rank with an error is
SIGTERM for the others.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback

GRACE = 3  # seconds that the others get to find out by themselves
LIMIT = 80  # seconds after which the ranks are killed


def main():
    import accelerate  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import dno.sweep  # noqa: F401

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        serve(**json.loads(line))


def serve(size, flags, cwd, defaults, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [start(rank, size, port, flags, cwd, defaults, environment) for rank in range(size)]
    print(json.dumps({"pids": pids}), flush=True)
    codes, failed, began = {}, None, time.monotonic()
    while len(codes) < size:
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                failed = failed or (codes[pid] != 0 and time.monotonic())
        late = time.monotonic() - began > LIMIT
        if late or (failed and time.monotonic() - failed > GRACE):
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            failed = time.monotonic()
        time.sleep(0.02)
    print(json.dumps({"codes": [codes[pid] for pid in pids]}), flush=True)


def start(rank, size, port, flags, cwd, defaults, changes):
    """Fork one rank: the script's main, with its output in files of its own. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        for name, value in {**environment, **changes}.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = str(value)
        import torch

        from dno.cli import main

        torch.set_num_threads(1)
        sys.argv = ["script.py", *flags]
        main("A test.\n\ncommands to try:", **defaults)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    main()
