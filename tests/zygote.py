"""Forks the processes in which tests run the scripts.

Importing torch takes seconds, and the tests run the scripts some hundred times. So one process
imports the libraries, and none of this project's modules, and then forks one process a run. These
are processes like any other: they have exit statuses and can be killed.

Reads a JSON object a line from standard input: a job to start, answered with its process id, or a
process id to wait for, answered with its exit status.
"""

import faulthandler
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

LIBRARIES = [
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "sklearn.datasets",
    "torch._dynamo",  # which optimizers import when they are made
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
    "torchvision.datasets",
]
for library in LIBRARIES:
    importlib.import_module(library)


def start(job):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(job["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, path in enumerate(job["output"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), target)
        faulthandler.dump_traceback_later(200, exit=True)  # if it hangs, it says where
        sys.argv = job["argv"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        if job["prelude"]:  # a file that changes the libraries, to provoke a failure
            runpy.run_path(job["prelude"])
        if not job["pictures"]:
            draw_nothing()
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def draw_nothing():
    runs, visualize = map(importlib.import_module, ("harness.runs", "visualize"))
    visualize.draw_run = lambda path: []
    runs.Run.show_figure = lambda *args: None


for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
    else:
        answer = start(job)
    print(json.dumps(answer), flush=True)
