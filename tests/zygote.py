"""Fork the processes in which tests run the scripts.

Importing torch takes seconds, and the tests run the scripts hundreds of times. This process imports
the libraries once, but no module of the project, and forks a process for each run. The processes
have exit statuses and can be killed.

It reads a JSON object per line from standard input: a job to start, answered with its process id,
or a process id to wait for, answered with its exit status.
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
    "torch._dynamo",  # optimizers import it
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
        faulthandler.dump_traceback_later(200, exit=True)  # if it hangs
        sys.argv = job["argv"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        if job["prelude"]:  # a file that patches libraries
            runpy.run_path(job["prelude"])
        if not job["pictures"]:
            disable_drawing()
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


def disable_drawing():
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
