"""Start distft's processes by forking one that has imported everything already.

Importing torch, transformers, PEFT and TRL takes every process about 10 s of CPU time, and the tests start hundreds of
processes. `Popen` is `subprocess.Popen`, except that `python -m MODULE` for one of `MODULES`, and `python FILE` for one
of `SCRIPTS`, is forked from a pristine process instead of executed. To everybody else such a process looks like any
other: it is a child of the process that started it, with its own command line and environment in /proc, its own signal
handlers and working folder.

Every process that may start others has a *template*: a child that was forked before it ran anything. To start a
process, the template forks twice and the process in the middle exits, so that the new process is adopted by the one
that asked, which has declared itself a subreaper. Before the new process runs anything, it forks a template of its own.

`DISTFT_TESTS_EXEC=1` in the environment of a command executes it as usual. An environment that differs from the
template's in a variable that libraries read while they are imported gets a template of its own when it is used for the
second time; until then, its command is executed. Linux only; elsewhere, and on machines with NVIDIA GPUs, every command
is executed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import logging
import multiprocessing.util
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

LAUNCHERS = {"accelerate.commands.launch", "torch.distributed.run"}
MODULES = LAUNCHERS | {
    "distft.cli",
    "distft.evaluation",
    "distft.train",
    "distft.training.batch_size_worker",
    "tests.distributed.program",
}
SCRIPTS = {"r1_ddp_qlora.py", "throughput.py", "without_guard.py"}
"""Names of files that are forked as well: those of benchmarks/, and of tests/distributed/test_guards.py."""

PRELOADED = (
    "accelerate.commands.launch",
    "bitsandbytes",
    "deepspeed",
    "distft.cli.main",
    "distft.evaluation.run",
    "distft.training.batch_size_worker",
    "distft.training.run",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "wandb",
)
NOT_THE_LAUNCHERS = re.compile(
    r"(bitsandbytes|datasets|deepspeed|distft|lm_eval|pandas|peft|pyarrow|scipy|sklearn|transformers|trl|wandb)(\.|$)"
)
READ_AT_IMPORT = re.compile(
    r"(HF_|TRANSFORMERS_|HUGGINGFACE|PYTHON|LD_|XDG_|HOME$|DISTFT_DEBUG$|GOMP_|OPENBLAS|TORCH_)"
)
"""Variables that the interpreter or a library reads once, so that a forked process would not see another value."""
SPARE_READS = re.compile("PYTHONSAFEPATH|TORCH_DISABLE_SHARE_RDZV_TCP_STORE|TORCH_NCCL_ASYNC_ERROR_HANDLING")
"""Those of them that are read where they are used."""
EXEC = "DISTFT_TESTS_EXEC"
PAD = "DISTFT_TESTS_PAD"
ARGUMENTS_SIZE, ENVIRONMENT_SIZE = 16_000, 120_000
"""Bytes that a template's command line and environment take, for those of its descendants are written over them."""

OTHERS_AT_ONCE = 2
"""How many templates for other environments are kept; each takes about 600 MB."""

Signature = tuple[tuple[str, str], ...]
_UNUSED: Any = object()
_PR_SET_CHILD_SUBREAPER = 36


class Template:
    """The pristine child of this process, reached through a socket."""

    def __init__(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._connection = connection
        self._environment = dict(environment)

    @property
    def signature(self) -> Signature:
        return _signature(self._environment)

    def end(self) -> None:
        """Let the template exit. The processes that it has started go on."""
        self._connection.close()

    def start(
        self, args: Sequence[str], env: Mapping[str, str] | None, cwd: str | None, session: bool, fds: Sequence[int]
    ) -> int:
        """Start the command with `fds` as its standard input, output and error; returns its process id."""
        request = {
            "args": [str(arg) for arg in args],
            "env": dict(os.environ if env is None else env),
            "cwd": os.fspath(cwd) if cwd is not None else str(Path.cwd()),
            "session": session,
        }
        data = json.dumps(request).encode()
        socket.send_fds(self._connection, [len(data).to_bytes(4, "big")], list(fds))
        self._connection.sendall(data)
        answer = self._connection.recv(4)
        if len(answer) < 4:
            raise OSError("the template process of tests/fork_server.py is gone")
        return int.from_bytes(answer, "big")


_template: Template | None = None
_others: dict[Signature, Template | None] = {}
"""Templates for other environments, the last used one last; None for an environment that was used once."""
_starts_others = False
_lock = threading.Lock()
_execute = subprocess.Popen


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` that forks where it can."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        names = list(inspect.signature(super()._execute_child).parameters)
        options = dict(zip(names[1:], rest, strict=True))
        plain = options["close_fds"] and options["umask"] == -1 and options["process_group"] in (-1, None)
        plain = plain and not any(options[name] for name in ("executable", "preexec_fn", "pass_fds", "shell"))
        plain = plain and all(options[name] is None for name in ("gid", "gids", "uid"))
        pipes = [options[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        env = options["env"]
        fds = [given if given != -1 else own for given, own in ((pipes[0], 0), (pipes[3], 1), (pipes[5], 2))]
        with _lock:
            template = _template_for(args, os.environ if env is None else env) if plain else None
            if template is not None:
                self.pid = template.start(args, env, options["cwd"], options["start_new_session"], fds)
        if template is None:
            super()._execute_child(args, *rest)
            return
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _template_for(args: Any, env: Mapping[str, str]) -> Template | None:
    """The template from which the command can be forked; None if it has to be executed."""
    if _template is None or env.get(EXEC):
        return None
    if not isinstance(args, list | tuple) or not args or args[0] != sys.executable:
        return None
    if _module(args) not in MODULES and _script(args) is None:
        return None
    signature = _signature(env)
    if signature == _template.signature:
        return _template
    if not _starts_others:
        return None
    known = _others.pop(signature, _UNUSED)
    _others[signature] = None if known is _UNUSED else known or _start_template(env)
    for other in [key for key, template in _others.items() if template is not None][:-OTHERS_AT_ONCE]:
        ended = _others.pop(other)
        assert ended is not None
        ended.end()
    return _others[signature]


def _signature(environment: Mapping[str, str]) -> Signature:
    """The variables that libraries read at import."""
    read = {name: value for name, value in environment.items() if READ_AT_IMPORT.match(name)}
    return tuple(sorted((name, value) for name, value in read.items() if not SPARE_READS.fullmatch(name)))


def install() -> None:
    """Start this process's template, and have `subprocess.Popen` fork from it."""
    global _template, _starts_others
    # A process that has initialised CUDA cannot fork one that uses it, and importing alone may do so.
    if _template is not None or not sys.platform.startswith("linux") or Path("/dev/nvidiactl").exists():
        return
    _become_subreaper()
    _template = _start_template(os.environ)
    _starts_others = True
    subprocess.Popen = Popen  # type: ignore[misc]


def _start_template(environment: Mapping[str, str]) -> Template:
    ours, theirs = socket.socketpair()
    # Libraries make temporary folders while they are imported, which all forked processes share.
    folder = tempfile.mkdtemp(prefix="distft-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}; import fork_server; fork_server.main()"
    with tempfile.TemporaryFile() as log:
        _execute(
            [sys.executable, "-c", program, str(theirs.fileno()), folder, "x" * ARGUMENTS_SIZE],
            env={**environment, PAD: "x" * ENVIRONMENT_SIZE},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        theirs.close()
    return Template(ours, environment)


def main() -> None:
    """The first template: import everything, then serve the process that started this one."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    del sys.path[0]
    os.environ.pop(PAD)
    subprocess.Popen = Popen  # type: ignore[misc]  # before the imports, some of which keep the class
    os.environ["DS_ACCELERATOR"] = "cpu"
    tempfile.tempdir = sys.argv[2]
    for name in PRELOADED:
        importlib.import_module(name)
    tempfile.tempdir = None
    _forget_exit_handlers()
    del os.environ["DS_ACCELERATOR"]
    assert threading.active_count() == 1, "a process with threads must not fork"
    with contextlib.suppress(ImportError):  # older versions have no such table, which takes a second to build
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        mapping.get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()
    _serve(connection, dict(os.environ))


def _forget_exit_handlers() -> None:
    """Drop what libraries have registered for the end of the process that imports them, such as removing a folder.

    Otherwise the first forked process to end, or to drop a module, would do it for all. Handlers that act on what a
    process has itself started or logged stay.
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.detach()
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    atexit._clear()
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def _serve(connection: socket.socket, environment: Mapping[str, str]) -> NoReturn:
    """Start a process for each request, until the process that asks is gone."""
    while True:
        header, fds, _, _ = socket.recv_fds(connection, 4, 3)
        if len(header) < 4:
            os._exit(0)
        size = int.from_bytes(header, "big")
        data = b""
        while len(data) < size:
            data += connection.recv(size - len(data))
        reading, writing = os.pipe()
        middle = os.fork()
        if middle == 0:
            parent = os.getpid()
            child = os.fork()
            if child:
                os.write(writing, child.to_bytes(4, "big"))
                os._exit(0)
            while os.getppid() == parent:  # until the process that asked has it
                time.sleep(0.001)
            _run(json.loads(data), fds, environment)
        for fd in (*fds, writing):
            os.close(fd)
        answer = os.read(reading, 4)
        os.close(reading)
        os.waitpid(middle, 0)
        connection.sendall(answer)


def _run(request: Mapping[str, Any], fds: Sequence[int], environment: Mapping[str, str]) -> NoReturn:
    """Become the process that was asked for, run it and exit."""
    global _template
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        _close_all_but(theirs.fileno())
        _serve(theirs, environment)
    _become_subreaper()
    if request["session"]:
        os.setsid()
    for target, fd in enumerate([os.dup(fd) for fd in fds]):
        os.dup2(fd, target)
    # The template's streams belong to a file, and would seek.
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]  # noqa: SIM115
        2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    _close_all_but(ours.fileno())
    os.set_inheritable(ours.fileno(), False)
    _template = Template(ours, environment)

    args: list[str] = request["args"]
    module, script = _module(args), _script(args)
    os.environ.clear()
    os.environ.update(request["env"])
    _show(args, request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["-m", *args[args.index("-m") + 2 :]] if script is None else args[args.index(script) :]
    sys.orig_argv = list(args)
    if not request["env"].get("PYTHONSAFEPATH"):
        sys.path.insert(0, request["cwd"] if script is None else str(Path(script).parent))
    if args[1] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if module in LAUNCHERS:
        # torch's launcher walks over sys.modules to name each caller that it logs: leave it only the modules of a fresh
        # start.
        for name in list(sys.modules):
            if NOT_THE_LAUNCHERS.match(name):
                del sys.modules[name]
    else:
        _set_threads()
    code = 1
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            if script is not None:
                runpy.run_path(script, run_name="__main__")
            else:
                assert module is not None
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code & 0xFF)


def _module(args: Sequence[Any]) -> str | None:
    """MODULE of `python [-u] -m MODULE …`."""
    words = [str(arg) for arg in args[1:4]]
    if words[:1] == ["-u"]:
        words = words[1:]
    return words[1] if words[:1] == ["-m"] and len(words) > 1 else None


def _script(args: Sequence[Any]) -> str | None:
    """FILE of `python [-u] FILE …` for one of `SCRIPTS`."""
    words = [str(arg) for arg in args[1:3] if arg != "-u"]
    return words[0] if words and Path(words[0]).name in SCRIPTS else None


def _become_subreaper() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _close_all_but(kept: int) -> None:
    os.closerange(3, kept)
    os.closerange(kept + 1, 4096)


def _show(args: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write the command line and environment to where /proc/PID/cmdline and /proc/PID/environ read them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    for parts, start, end in (
        (args, int(fields[45]), int(fields[46])),
        ([f"{name}={value}" for name, value in environment.items()], int(fields[47]), int(fields[48])),
    ):
        block = b"".join(part.encode(errors="surrogateescape") + b"\0" for part in parts)
        size = end - start
        assert len(block) < size, "enlarge ARGUMENTS_SIZE or ENVIRONMENT_SIZE"
        ctypes.memmove(start, block.ljust(size, b"\0"), size)


def _set_threads() -> None:
    """OMP_NUM_THREADS, which the OpenMP libraries read when they were loaded."""
    import torch

    count = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    torch.set_num_threads(count)
    for path in set(re.findall(r"/\S*gomp\S*", Path("/proc/self/maps").read_text())):
        with contextlib.suppress(OSError):
            ctypes.CDLL(path).omp_set_num_threads(count)
