"""Bad input to the commands, and kills: one sentence or a result, never a traceback, a hang, or something left behind.

Each case has a folder of its own with a corpus, a plan, a finished comparison and models in two formats. A case damages
an option, a value in a file or a file, or kills a comparison and resumes it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from random import Random

from forked import Server
from timed import fuzz
from typer.main import get_command

from sqa.cli import app

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS, WALL_SECONDS = 20, 300  # of the processor, so that a busy machine finds nothing; asleep, of the clock
PLAN = """
context = 32
batch_size = 4
budget = "steps=3"
timing_rounds = 0
evaluation_tokens = 200
threads = 1
seeds = [0]
train_fraction = 0.9
validation_fraction = 0.1
checkpoint_seconds = 0.05
variants = ["gqa", "sqa"]
data = "text.jsonl"
[model]
vocab_size = 320
num_layers = 2
d_ff = 48
d_model = 32
num_heads = 4
"""
COMMANDS = {
    "variants": "--json new.json",
    "kernels": "",
    "plan": "--preset demo --variants sqa --n 64 --out new",
    "scale": "--gpus 8 --n 4096 --variants sqa --json new.json",
    "compare": "tiny.toml --out new",
    "train": "tiny.toml --out new",
    "report": "done --out new",
    "generate": "done/sqa-0 --prompt The --max-new-tokens 4",
    "evaluate": "stock done/sqa-0 --data text.jsonl --items 4 --json new.json",
    "export": "done/sqa-0 new",
    "import": "stock new",
    "convert": "stock new --query-heads 1 --calibration text.jsonl --sequences 8 --length 16 --evaluation-tokens 64 "
    "--speed-at 16",
    "bench attention": "--n 32 --variants sqa --rounds 1 --dtypes fp32 --json new.json",
    "bench step": "--model stock --length 16 --batch-size 1 --rounds 1 --dtypes fp32 --no-compile",
    "bench prefill": "--model stock --n 16 --rounds 1 --no-compile",
    "bench decode": "--model stock --n 16 --rounds 1",
}
"""Each command and arguments with which it ends well in a second or two."""

TEXTS = (
    "", "-1", "0", "1", "3", "0.5", "1e9", "nan", "inf", "-inf", "999999999", "x", "auto", "1,,2", "1,1", ",", "ü\n",
    "..", "done", "stock", "text.jsonl", "tiny.toml", "nowhere/x", "tokens=-1", "steps=1e400", "time=0s", "9" * 400,
    "sqa,sqa",
)  # fmt: skip
VALUES = (
    None, True, 0, 1, -1, 3, 0.5, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), "", "x", "\n", "3",
    "é" * 999, [], [1], [None], {}, {"a": 1},
)  # fmt: skip
HUGE = ("1e9", "999999999", "9" * 400)
LONG = {
    "rounds", "max_steps", "max_tokens", "budget", "max_new_tokens", "batch_size", "sequences", "length", "n", "items",
    "context", "evaluation_tokens", "speed_at", "heal",
}  # fmt: skip
"""Options of which a huge number rightly means long work."""
TEMPORARY = re.compile(r"\.(.+\.tmp|.+\.[a-z0-9_]{8}|lock.*)")
# what is said of long work on a busy machine, and once in a new cache folder
REMINDER = re.compile(r".+, \d+ s so far|compiling .+ for this processor, which is done once")
FINDINGS = ("Traceback", "terminate called", "core dumped", "this is a bug")


class Finding(Exception):
    """What a case must not do."""


def run(folder: Path, *arguments: str, kill: tuple[int, float] | None = None) -> subprocess.CompletedProcess[str]:
    """`sqa` in the folder. Raises Finding for a traceback, a crash or a hang. `kill`: a signal and when to send it."""
    try:
        done = server().run(folder, arguments, WALL_SECONDS, kill)
    except TimeoutError as error:
        raise Finding(f"{arguments} hangs\n{error}") from None
    killed = kill is not None and done.returncode == -kill[0]
    if any(word in done.stderr for word in FINDINGS) or (done.returncode < 0 and not killed):
        raise Finding(f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@cache
def server() -> Server:
    folder = tempfile.mkdtemp(prefix="sqa-fuzz-cache-")
    ours = {"XDG_CACHE_HOME": folder, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    return Server({**os.environ, "PYTHONPATH": str(ROOT / "src"), **ours}, CPU_SECONDS)


@cache
def origin() -> Path:
    """The folder that each case gets a copy of."""
    folder = Path(tempfile.mkdtemp(prefix="sqa-fuzz-"))
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, len(words), 5):
            text = " ".join(words[start : start + 40])
            file.write(json.dumps({"text": f"{text}\n\n{text}"}) + "\n")
    (folder / "tiny.toml").write_text(PLAN, encoding="utf-8")
    for arguments in (("compare", "tiny.toml", "--out", "done"), ("export", "done/gqa-0", "stock")):
        done = run(folder, *arguments)
        assert done.returncode == 0, done.stderr
    return folder


def case(random: Random) -> None:
    with tempfile.TemporaryDirectory(prefix="sqa-fuzz-case-") as temporary:
        folder = Path(temporary) / "folder"
        shutil.copytree(origin(), folder, symlinks=True)
        kind = random.choices((bad_option, bad_value, bad_file, killed), (4, 3, 3, 1))[0]
        kind(random, folder)


def bad_option(random: Random, folder: Path) -> None:
    """One or two options of a command get a text that may make no sense."""
    name = random.choice(list(COMMANDS))
    command = get_command(app)
    for part in name.split():
        command = command.commands[part]  # type: ignore[attr-defined]
    arguments = COMMANDS[name].split()
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    for option in random.sample(options, min(len(options), random.choice((1, 1, 2)))):
        flag = random.choice(option.opts + option.secondary_opts)
        text = random.choice([text for text in TEXTS if option.name not in LONG or text not in HUGE])
        arguments += [flag] if option.is_flag else [f"{flag}={text}"]  # type: ignore[attr-defined]
    if random.random() < 0.1 and arguments:
        arguments[0] = random.choice(TEXTS)
    unchanged(folder, *name.split(), *arguments)


READERS = {
    "tiny.toml": ("compare", "train"),
    "text.jsonl": ("compare", "train", "convert", "evaluate"),
    "stock/config.json": ("import", "convert", "bench prefill"),
    "stock/tokenizer.json": ("import", "convert"),
    "stock/tokenizer_config.json": ("import", "convert"),
    "stock/model.safetensors": ("import", "convert", "bench step", "evaluate"),
    "done/sqa-0/config.json": ("generate", "export"),
    "done/sqa-0/tokenizer.json": ("generate", "export"),
    "done/sqa-0/model.safetensors": ("generate", "export"),
    "done/plan.json": ("report", "resume"),
    "done/results.jsonl": ("report", "resume"),
    "done/sqa-0/curve.jsonl": ("report",),
}
"""Files, and the commands that read them."""


def bad_value(random: Random, folder: Path) -> None:
    """A value somewhere in a file becomes another."""
    name = random.choice([name for name in READERS if name.endswith((".json", ".jsonl", ".toml"))])
    path = folder / name
    if name.endswith(".toml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        at = random.choice([i for i, line in enumerate(lines) if "=" in line])
        values = ("true", "-1", "0", "nan", "inf", "1e400", "9" * 30, '""', '"x"', "[]", "{}", "[{}]", "x")
        value = random.choice(values)
        lines[at] = f"{lines[at].split('=')[0]}= {value}"
        path.write_text("\n".join(lines), encoding="utf-8")
    elif name.endswith(".jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        at = random.randrange(len(lines))
        lines[at] = json.dumps(changed(random, json.loads(lines[at])))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(changed(random, json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    read(random, folder, name)


def changed(random: Random, value: object) -> object:
    """The value with one other value somewhere inside, or a key less."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: changed(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        return [*value[:at], changed(random, value[at]), *value[at + 1 :]]
    return random.choice(VALUES)


def bad_file(random: Random, folder: Path) -> None:
    """A file is cut, overwritten, no file at all, or not there."""
    name = random.choice(list(READERS))
    path = folder / name
    content = path.read_bytes()
    at = random.randrange(len(content))
    how = random.choice(("cut", "flip", "random", "utf-8", "empty", "gone", "folder", "link"))
    path.unlink()
    match how:
        case "cut" if name == "tiny.toml":  # a shorter plan is a plan too, and trains for minutes
            path.write_bytes(content[:at] + b'"')
        case "cut":
            path.write_bytes(content[:at])
        case "flip":
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :])
        case "random":
            path.write_bytes(random.randbytes(random.randrange(2000)))
        case "utf-8":
            path.write_bytes(content[:at] + b"\xff\xfe" + content[at:])
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("/dev/null")
    read(random, folder, name)


def read(random: Random, folder: Path, name: str) -> None:
    """Runs one of the commands that read a file."""
    command = random.choice(READERS[name])
    arguments = ["compare", "--resume", "done"] if command == "resume" else command.split() + COMMANDS[command].split()
    unchanged(folder, *arguments)


def unchanged(folder: Path, *arguments: str) -> None:
    """A command that refuses its input says so in one line and leaves the folder as it was."""
    before = listing(folder)
    done = run(folder, *arguments)
    if done.returncode == 2:
        new = listing(folder) ^ before
        usage = done.stderr.startswith("Usage:")  # the parser's own: several lines
        said = [line for line in done.stderr.splitlines() if not REMINDER.fullmatch(line)]
        if new or not (usage or len(said) == 1):
            raise Finding(f"{arguments} left {sorted(new)}\n{done.stderr}")
    leftovers(folder, arguments)


def leftovers(folder: Path, arguments: tuple[str, ...]) -> None:
    """Raises Finding for temporary files and locks."""
    left = [name for name in listing(folder) if any(TEMPORARY.fullmatch(part) for part in Path(name).parts)]
    if left:
        raise Finding(f"{arguments} left {left}")


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def killed(random: Random, folder: Path) -> None:
    """A comparison that is killed, perhaps again and again, ends as if it had not been."""
    whole = results(folder / "done")
    (folder / "tiny.toml").write_text(PLAN, encoding="utf-8")
    arguments: tuple[str, ...] = ("compare", "tiny.toml", "--out", "new")
    start = time.monotonic()
    run(folder, "compare", "tiny.toml", "--out", "timed")
    seconds = time.monotonic() - start
    for _ in range(random.choice((1, 1, 2, 3))):
        number = random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        run(folder, *arguments, kill=(number, random.random() * seconds))
        if (folder / "new" / "plan.json").exists():
            arguments = ("compare", "--resume", "new")
    done = run(folder, *arguments)
    if done.returncode or results(folder / "new") != whole:
        raise Finding(f"{arguments} after a kill ended with {done.returncode}\n{done.stderr}")
    leftovers(folder / "new", arguments)


def results(folder: Path) -> dict[str, object]:
    """The final figures of each run."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["variant"]: row["val"] for row in map(json.loads, lines)}


if __name__ == "__main__":
    fuzz(case, "Bad input to the commands, and kills")
