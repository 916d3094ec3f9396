"""`python -m sqa` in forks of one process that has imported it: no start of Python for each command.

A fork goes on to the end of this file, so it parses its arguments, handles signals and exits as a process of its own.
The parent takes requests on standard input, a JSON list a line, and answers with the process id, then the exit code.
It imports what takes long and starts no thread: a fork has none of them.
"""

import json
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from select import select
from tempfile import TemporaryDirectory

IMPORTED = (
    "sqa.cli", "sqa.model", "accelerate", "altair", "jinja2.sandbox", "numpy", "safetensors.torch", "tokenizers",
    "transformers", "transformers.models.llama.modeling_llama",
)  # fmt: skip


class Server:
    """Starts the parent in `environment`, each fork being allowed so many seconds of the processor."""

    def __init__(self, environment: dict[str, str], cpu_seconds: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(cpu_seconds)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self, folder: Path, arguments: tuple[str, ...], seconds: float, kill: tuple[int, float] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`sqa` in the folder. Raises TimeoutError after `seconds`. kill: a signal, and after how long it is sent."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        with TemporaryDirectory(prefix="sqa-fuzz-output-") as output:
            print(json.dumps([str(folder), output, *arguments]), file=requests, flush=True)
            process, late = int(answers.readline()), False
            if kill is not None and not select([answers], [], [], kill[1])[0]:
                os.kill(process, kill[0])
            if not select([answers], [], [], seconds)[0]:
                late = True
                os.kill(process, 9)
            code = int(answers.readline())
            out, err = ((Path(output) / name).read_text(errors="replace") for name in ("out", "err"))
        if late:
            raise TimeoutError(f"{out}\n{err}")
        return subprocess.CompletedProcess(arguments, code, out, err)


def serve(cpu_seconds: int) -> list[str]:
    """Forks for each request; in a fork, returns its arguments."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder, output, *arguments = json.loads(line)
        process = os.fork()
        if process == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
            return arguments
        print(process, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)
    sys.exit()


if __name__ == "__main__":
    for name in IMPORTED:
        __import__(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a process of {len(threads)} threads must not fork"
    sys.argv = ["sqa", *serve(int(sys.argv[1]))]
    runpy.run_module("sqa", run_name="__main__", alter_sys=True)
