"""The command line as a person types it: figures, files, exit codes, and one clear sentence for bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_COUNTS = {
    "mha": (16, 16, 11_966_224),
    "gqa": (16, 4, 11_179_792),
    "mqa": (16, 1, 10_983_184),
    "sqa": (8, 4, 10_655_504),
    "ssqa": (8, 8, 10_917_648),
    "xsqa": (4, 4, 10_393_360),
    "xsmqa": (4, 1, 10_196_752),
}
RESULT_FIELDS = {
    "variant", "seed", "config", "parameters", "steps", "tokens", "wall_s", "step_s", "val", "kernel", "device",
    "dtype", "versions", "git", "data_fingerprint",
}  # fmt: skip
VAL_FIELDS = {
    "loss", "perplexity", "accuracy", "bits_per_byte", "tokens", "loss_all_positions", "accuracy_all_positions",
}  # fmt: skip
TINY = """
layout = "{layout}"
context = 32
batch_size = 4
budget = "steps=6"
timing_rounds = {rounds}
evaluation_tokens = 500
threads = 1
seeds = [0]
train_fraction = 0.9
validation_fraction = 0.1
variants = ["gqa", "sqa"]
data = "text.jsonl"
[model]
vocab_size = 320
num_layers = 2
d_ff = 48
d_model = 32
num_heads = 4
"""


def sqa(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "sqa", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a small corpus of real text and a plan over it."""
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    with open(tmp_path / "text.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, len(words), 20):
            file.write(json.dumps({"text": " ".join(words[start : start + 40])}) + "\n")
    (tmp_path / "tiny.toml").write_text(TINY.format(layout="packed", rounds=2), encoding="utf-8")
    return tmp_path


def rows_in(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_variants_prints_the_published_counts(tmp_path: Path) -> None:
    done = sqa("variants", "--preset", "published", "--json", "out.json", cwd=tmp_path)
    found = {
        row["variant"]: (row["num_query_heads"], row["num_kv_heads"], row["parameters"])
        for row in json.loads((tmp_path / "out.json").read_text())
    }
    assert found == PUBLISHED_COUNTS
    for _, _, count in PUBLISHED_COUNTS.values():
        assert f"{count:,}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_variants_says_which_rules_do_not_fit(tmp_path: Path) -> None:
    done = sqa("variants", "--preset", "larger", "--all", cwd=tmp_path)
    assert re.search(r"left out: variant wide-gqa: .* got num_heads=12, 8 or 16 would fit", done.stdout)


def test_kernels_says_what_a_shape_gets_and_why(tmp_path: Path) -> None:
    assert ": blocks (skips" in " ".join(
        sqa("kernels", "--window", "64", "--dtype", "float16", cwd=tmp_path).stdout.split()
    )
    assert "no CPU backward" in sqa("kernels", cwd=tmp_path).stdout


def test_bench_attention_writes_rows(tmp_path: Path) -> None:
    options = "--n 64 --variants gqa,sqa --rounds 1 --dtypes fp32 --json rows.jsonl --plot plot.svg"
    done = sqa("bench", "attention", *options.split(), cwd=tmp_path)
    header, *rows = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert header["kind"] == "header"
    assert {row["variant"] for row in rows} == {"gqa", "sqa"}
    assert all(row["kernel"] for row in rows)
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_plan_writes_what_compare_reads(tiny: Path) -> None:
    sqa(
        "plan",
        "--preset",
        "demo",
        "--budget",
        "equal-flops",
        "--variants",
        "sqa",
        "--n",
        "64",
        "--out",
        "plans",
        cwd=tiny,
    )
    plans = sorted((tiny / "plans").glob("*.toml"))
    assert plans
    options = "--data text.jsonl --max-steps 1 --context 32 --batch-size 2"
    done = sqa("compare", str(plans[0]), *options.split(), cwd=tiny)
    assert "SQA" in done.stdout


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_comparison_from_plan_to_table_and_generation(tiny: Path, layout: str) -> None:
    (tiny / "tiny.toml").write_text(TINY.format(layout=layout, rounds=2), encoding="utf-8")
    done = sqa("compare", "tiny.toml", "--out", "out", "--json", "table.json", cwd=tiny)
    rows = rows_in(tiny / "out")
    assert [row["variant"] for row in rows] == ["gqa", "sqa"]
    for row in rows:
        assert set(row) == RESULT_FIELDS
        assert set(row["val"]) == VAL_FIELDS
        assert set(row["step_s"]) == {"p20", "median", "p80"}
        assert row["kernel"] == ("blocks" if layout == "packed" else "sdpa")
        assert (row["val"]["loss_all_positions"] is None) == (layout == "packed")
    record = json.loads((tiny / "out" / "plan.json").read_text())
    assert record["data"]["fingerprint"] == rows[0]["data_fingerprint"]
    assert record["steps"] == {"gqa": 6, "sqa": 6}
    assert str(tiny) not in (tiny / "out" / "plan.json").read_text()
    assert {row["variant"] for row in json.loads((tiny / "table.json").read_text())} == {"gqa", "sqa"}
    assert "SQA" in done.stdout
    assert "loss" in done.stdout

    # the same plan again prints the table and trains nothing
    again = sqa("compare", "tiny.toml", "--out", "out", cwd=tiny)
    assert rows_in(tiny / "out") == rows
    assert "6 steps" not in again.stdout
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    other = sqa("compare", "tiny.toml", "--out", "out", "--max-steps", "7", cwd=tiny, check=False)
    assert other.returncode == 2
    assert "already holds another comparison (budget: 'steps=6' there, 'steps=7' now)" in other.stderr

    pages = list((tiny / "out" / "report").glob("*.html"))
    assert len(pages) == 1
    assert str(pages[0]) in sqa("report", str(tiny / "out"), cwd=tiny).stdout

    greedy = ["generate", "out/sqa-0", "--prompt", "The License", "--max-new-tokens", "8"]
    first, second = (sqa(*greedy, cwd=tiny).stdout for _ in range(2))
    assert first == second
    assert first.startswith("The License")
    sampled = sqa(*greedy, "--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", cwd=tiny)
    assert sampled.stdout.startswith("The License")


def test_the_same_seed_gives_bitwise_the_same_losses(tiny: Path) -> None:
    plan = TINY.format(layout="packed", rounds=0)
    (tiny / "tiny.toml").write_text(plan, encoding="utf-8")
    for out in ("a", "b"):
        sqa("compare", "tiny.toml", "--seeds", "0,5", "--variants", "sqa", "--out", out, cwd=tiny)
    a, b = ([(tiny / out / run / "curve.jsonl").read_text().splitlines() for run in ("sqa-0", "sqa-5")] for out in "ab")
    losses_a, losses_b = ([[json.loads(line)["loss"] for line in curve] for curve in curves] for curves in (a, b))
    assert losses_a == losses_b
    assert losses_a[0] != losses_a[1]
    assert [row["val"] for row in rows_in(tiny / "a")] == [row["val"] for row in rows_in(tiny / "b")]


@pytest.mark.timeout(600)  # it starts seven processes
def test_a_killed_comparison_resumes_to_bitwise_the_same_results(tiny: Path) -> None:
    plan = TINY.format(layout="packed", rounds=0).replace('"steps=6"', '"steps=200"') + "\n"
    plan = plan.replace("threads = 1", "threads = 1\ncheckpoint_seconds = 0.05")
    (tiny / "tiny.toml").write_text(plan, encoding="utf-8")
    sqa("compare", "tiny.toml", "--out", "whole", cwd=tiny)
    command = [sys.executable, "-m", "sqa", "compare", "tiny.toml", "--out", "parts"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=tiny, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        run = tiny / "parts" / ("gqa-0" if number == signal.SIGKILL else "sqa-0")
        deadline = time.monotonic() + 240
        while not list(run.glob("checkpoints/step-*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that it cannot end meanwhile
        if number == signal.SIGTERM:
            second = sqa("compare", "--resume", "parts", cwd=tiny, check=False)
            assert second.returncode == 2
            assert f"is being written by process {process.pid}" in second.stderr
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
        if number == signal.SIGTERM:
            assert "go on with: sqa compare --resume parts" in errors
        command = [sys.executable, "-m", "sqa", "compare", "--resume", "parts"]
    fresh = sqa("compare", "tiny.toml", "--out", "parts", cwd=tiny, check=False)
    assert fresh.returncode == 2
    assert "unfinished; go on with --resume parts" in fresh.stderr
    changed = sqa("compare", "--resume", "parts", "--batch-size", "2", cwd=tiny, check=False)
    assert changed.returncode == 2
    assert "begun with another plan (batch_size: 4 there, 2 now)" in changed.stderr
    sqa("compare", "--resume", "parts", cwd=tiny)
    whole, parts = (
        {row["variant"]: (row["val"], row["tokens"]) for row in rows_in(tiny / out)} for out in ("whole", "parts")
    )
    assert whole == parts
    for run in ("gqa-0", "sqa-0"):
        losses = [
            [json.loads(line)["loss"] for line in (tiny / out / run / "curve.jsonl").read_text().splitlines()]
            for out in ("whole", "parts")
        ]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 200


def test_a_run_that_diverges_is_named_and_the_others_go_on(tiny: Path) -> None:
    plan = TINY.format(layout="packed", rounds=0).replace("threads = 1", "threads = 1\nlearning_rate = 1e30")
    (tiny / "tiny.toml").write_text(plan, encoding="utf-8")
    done = sqa("compare", "tiny.toml", "--out", "out", "--max-steps", "30", cwd=tiny, check=False)
    assert done.returncode == 1
    assert re.search(r"gqa seed 0: loss was nan at step \d+; last good checkpoint: none", done.stderr)
    assert "sqa seed 0: loss was nan" in done.stderr


def test_train_export_import_and_generate_agree(tiny: Path) -> None:
    sqa("train", "tiny.toml", "--variant", "sqa", cwd=tiny)
    run = "runs/tiny-sqa"
    sqa("export", run, "exported", cwd=tiny)
    assert json.loads((tiny / "exported" / "config.json").read_text())["model_type"] == "llama"
    sqa("import", "exported", "imported", cwd=tiny)
    texts = [sqa("generate", folder, "--prompt", "The License", cwd=tiny).stdout for folder in (run, "imported")]
    assert texts[0] == texts[1]
    for arguments in (("export", run, "exported"), ("import", "exported", "imported"), ("import", "text.jsonl", "x")):
        refused = sqa(*arguments, cwd=tiny, check=False)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1


def test_train_makes_one_run(tiny: Path) -> None:
    sqa("train", "tiny.toml", "--variant", "xsqa", "--seed", "4", "--track", "tensorboard", cwd=tiny)
    assert [(row["variant"], row["seed"]) for row in rows_in(tiny / "runs" / "tiny-xsqa")] == [("xsqa", 4)]
    assert len(list((tiny / "runs" / "tiny-xsqa" / "tensorboard" / "xsqa-4").iterdir())) == 1
    assert sqa("generate", "runs/tiny-xsqa", "--prompt", "The", "--max-new-tokens", "3", cwd=tiny).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare nothing.toml", "neither a file nor a plan of the package"),
        ("compare tiny.toml --variants gqa,sqx", "'sqx' is unknown; did you mean 'sqa'"),
        ("compare tiny.toml --data nowhere", "nowhere"),
        ("compare tiny.toml --data empty", "empty"),
        ("train tiny.toml --data=", "data must be builtin, wikipedia or the path of a file or folder, not ''"),
        ("train tiny.toml --budget epochs=1e300", "budget: epochs must be at most 1e+06, got '1e300'"),
        ("compare tiny.toml --max-steps 5 --max-tokens 100", "give one of --budget, --max-steps and --max-tokens"),
        ("compare tiny.toml --seeds 1,1", "none of them twice"),
        ("compare tiny.toml --seeds x", "--seeds must be a number of seeds (3) or a list (0,7,9), got 'x'"),
        ("compare tiny.toml --context 30000", "30000"),
        ("compare tiny.toml --context 1", "plan: context must be at least 2, got 1"),
        ("compare tiny.toml --dtype float8", "dtype must be one of 'float32', 'bfloat16', got 'float8'"),
        ("compare tiny.toml --out taken", "taken already holds other files"),
        ("compare --resume empty", "empty holds no comparison"),
        ("compare tiny.toml --json nowhere/x.json", "--json nowhere/x.json is in a folder that does not exist"),
        ("compare tiny.toml --track wandb", "--track must be tensorboard, got 'wandb'"),
        ("compare tiny.toml --resume empty", "leave out 'tiny.toml'"),
        ("train --variant mha --resume empty", "leave out --variant and --seed"),
        ("compare tiny.toml --out tiny.toml", "tiny.toml"),
        ("variants --json empty", "--json empty is a folder; name a file"),
        ("bench attention --plot x.txt", "plot: 'x.txt' must end in .svg, .png, .html or .json"),
        ("bench attention --plot nowhere/x.svg", "--plot nowhere/x.svg is in a folder that does not exist"),
        ("bench attention --dtypes ,", "benchmark: dtypes must be at least 1, got 0"),
        ("kernels --n 0", "n must be at least 1, got 0"),
        (
            "bench prefill --model empty --preset demo",
            "--model is measured as it is; leave out --preset and --variants",
        ),
        ("bench step --model empty", "empty"),
        ("bench step --peers llama-cpp", "peer: llama-cpp cannot train"),
        ("bench attention --head-dims 0", "--head-dims must be numbers of at least 1, got '0'"),
        ("bench attention --n 10,x", "--n must be whole numbers separated by commas, got '10,x'"),
        ("bench step --budget 3d", "budget: time needs a number above 0"),
        ("kernels --dtype int8", "dtype: 'int8' is unknown (dtypes: fp32, bf16, fp16"),
        ("plan --budget equal-fun", "budget: must be one of"),
        ("plan --budget equal-time --device abacus", "device: 'abacus' cannot be used here"),
        ("scale --n 0", "--n must be numbers of at least 1, got '0'"),
        ("scale --gpus 8,-1", "--gpus must be numbers of at least 1, got '8,-1'"),
        ("variants --n 0", "n must be at least 1, got 0"),
        ("compare tiny.toml --seeds 999999999", "--seeds must be from 1 to 1000 seeds, got '999999999'"),
        ("scale --gpus 8 --n=,", "--n must be numbers of at least 1, got ','"),
        ("convert model out --query-heads 2 --calibration builtin --speed-at=-1", "--speed-at must be numbers of at"),
        ("scale --preset 9b", "preset: '9b' is unknown (presets: "),
        ("compare tiny.toml --only sqa:7", "only: 'sqa:7' is not a run of the plan (variants gqa, sqa; seeds 0)"),
        ("compare tiny.toml --launcher slurm", "--launcher must be local or ray, got 'slurm'"),
        ("report empty", "empty holds no"),
        ("plan --preset demo --variants sqa --n 64 --out tiny.toml", "tiny.toml: this is no folder, and a folder is"),
        ("compare tiny.toml --out tiny.toml", "tiny.toml: this is no folder, and a folder is needed here"),
        ("bench attention --plot=x.svg --json=./x.svg", "x.svg is named by another option too; name another file"),
        ("convert --json=new model new --query-heads 1 --calibration builtin", "new is named by another option too"),
        ("evaluate a b --data text.jsonl --json=b", "b is named by another option too; name another file"),
        ("variants --preset publisched", "did you mean 'published'"),
        ("generate empty --prompt x", "empty holds no finished run"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny: Path, arguments: str, message: str) -> None:
    (tiny / "empty").mkdir()
    (tiny / "taken").mkdir()
    (tiny / "taken" / "thesis.txt").write_text("mine")
    before = sorted(str(path) for path in tiny.rglob("*"))
    done = sqa(*arguments.split(), cwd=tiny, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len([line for line in lines if not re.fullmatch(r"preparing, \d+ s so far", line)]) == 1  # a slow machine
    assert sorted(str(path) for path in tiny.rglob("*")) == before


@pytest.mark.parametrize("seed", ["-1", str(2**63), "9" * 5000])
def test_a_seed_is_bounded(tmp_path: Path, seed: str) -> None:
    done = sqa("generate", "model", "--prompt", "x", f"--seed={seed}", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Invalid value for '--seed'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["compare", "train", "convert"])
@pytest.mark.parametrize("threads", ["-1", "100000"])
def test_a_thread_count_is_bounded_wherever_it_is_an_option(tmp_path: Path, command: str, threads: str) -> None:
    others = ["m", "o", "--query-heads", "2", "--calibration", "builtin"] if command == "convert" else ["demo"]
    done = sqa(command, *others, "--threads", threads, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Invalid value for '--threads'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", ["ValueError('inner')", "ImportError('inner')", "OSError(5, 'inner')"])
def test_a_bug_shows_its_traceback_and_says_so(tmp_path: Path, error: str) -> None:
    code = (
        "import sys, sqa.cli, sqa.cost\n"
        f"def broken(*arguments): raise {error}\n"
        "sqa.cost.variant_costs = broken\n"
        "sys.argv = ['sqa', 'variants']\n"
        "sqa.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "inner" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sqa: this is a bug in sqa ")


def test_a_missing_extra_is_one_sentence_that_works_from_a_clone(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['altair'] = None\n"
        "sys.argv = 'sqa bench attention --n 16 --variants 2/1x16 --rounds 1 --plot x.svg'.split()\n"
        "from sqa.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    message = "sqa: plots need altair; run in a clone of the repository: pip install -c constraints.txt -e '.[report]'"
    assert [line for line in done.stderr.splitlines() if "so far" not in line] == [message]  # of a busy machine


def test_a_closed_pipe_ends_with_a_word_and_the_comparison_goes_on(tiny: Path) -> None:
    (tiny / "tiny.toml").write_text(TINY.format(layout="packed", rounds=0), encoding="utf-8")
    command = [sys.executable, "-m", "sqa", "compare", "tiny.toml", "--out", "out"]
    process = subprocess.Popen(command, cwd=tiny, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert any("runs left" in line for line in process.stdout)
    process.stdout.close()
    with process.stderr:
        errors = process.stderr.read()
    assert process.wait(timeout=120) == 141
    assert errors == "sqa: standard output was closed by its reader; go on with: sqa compare --resume out\n"
    sqa("compare", "--resume", "out", cwd=tiny)
    assert len(rows_in(tiny / "out")) == 2


def test_a_command_that_prints_to_a_closed_pipe_ends_with_a_word(tmp_path: Path) -> None:
    """The second line finds nobody: as the answer of `sqa generate ... | head -c 1` did."""
    code = (
        "import sys, time, sqa.interop as interop\n"
        "def notes(*arguments):\n"
        "    yield 'one'\n"
        "    sys.stdin.read()\n"
        "    yield 'two'\n"
        "interop.import_model = notes\n"
        "sys.argv = ['sqa', 'import', 'a', 'b']\n"
        "from sqa.cli import main; main()"
    )
    command = [sys.executable, "-c", code]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "one\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "sqa: standard output was closed by its reader\n"
        assert process.wait(timeout=120) == 141


def test_a_full_disk_below_standard_output_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sqa", "variants"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "sqa: standard output: No space left on device\n")


def test_json_is_written_to_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link.json").symlink_to("kept/new.json")
    (tmp_path / "nowhere.json").symlink_to("gone/new.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for _ in range(2):
        sqa("variants", "--json", "link.json", cwd=tmp_path)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "kept" / "new.json").read_text())
    for name, what in (("nowhere", "is in a folder that does not exist"), ("loop", "is no regular file")):
        done = sqa("variants", "--json", f"{name}.json", cwd=tmp_path, check=False)
        assert (done.returncode, done.stderr) == (2, f"sqa: --json {name}.json {what}; name a file\n")
        assert (tmp_path / f"{name}.json").is_symlink()


@pytest.mark.parametrize("columns", ["20", "60"])
def test_a_narrow_terminal_cuts_no_figure(tmp_path: Path, columns: str) -> None:
    shown = []
    for width in (columns, "80"):
        environment = {**os.environ, "COLUMNS": width}
        command = [sys.executable, "-m", "sqa", "variants", "--preset", "8b"]
        shown.append(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout)
    assert shown[0] == shown[1]
    assert "8,835,567,616" in shown[1]
    assert "…" not in shown[1]
    assert max(map(len, shown[1].splitlines())) <= 80


def test_help_groups_the_commands_by_purpose(tmp_path: Path) -> None:
    lines = sqa("--help", cwd=tmp_path).stdout.splitlines()
    panels = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert panels == ["Options", "Train and compare", "Models", "What a shape costs", "Measure"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sqa tr", ["train"]),
        ("sqa variants --preset de", ["demo"]),
        ("sqa compare --variants gqa,xs", ["gqa,xsqa", "gqa,xsmqa"]),
    ],
)
def test_the_shell_completes_commands_presets_and_variants(tmp_path: Path, typed: str, offered: list[str]) -> None:
    words = len(typed.split())
    environment = {**os.environ, "_SQA_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(words - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv = ['sqa']; from sqa.cli import main; main()"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == offered


def test_want_of_memory_is_one_sentence(tmp_path: Path) -> None:
    done = sqa("bench", "step", "--length", "99999999999", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("sqa: out of memory (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.articles
def test_sample_articles_train(articles: Path, tmp_path: Path) -> None:
    """The published recipe, cut to a few small steps, on real articles."""
    options = "--max-steps 8 --batch-size 2 --micro-batch-size 1 --context 128 --variants sqa --no-compile"
    done = sqa("compare", "published", "--data", str(articles / "sample.parquet"), *options.split(), cwd=tmp_path)
    (row,) = rows_in(tmp_path / "runs" / "published")
    assert row["parameters"] == PUBLISHED_COUNTS["sqa"][2]
    assert row["val"]["loss_all_positions"] is not None
    assert "/" not in json.loads((tmp_path / "runs/published/plan.json").read_text())["data"]["name"]
    assert "SQA" in done.stdout


def test_without_the_extra_report_a_comparison_ends_well_and_names_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "absent").mkdir()
    (tiny / "absent" / "altair.py").write_text("raise ImportError('altair')\n")
    paths = [str(tiny / "absent"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    done = sqa("compare", "tiny.toml", "--out", "out[a]", "--variants", "sqa", cwd=tiny)
    assert "pip install -c constraints.txt -e '.[report]'" in done.stdout
    assert "Rows: out[a]/results.jsonl" in done.stdout


def test_json_goes_to_a_regular_file_alone(tmp_path: Path) -> None:
    """A rename would put a file in the place of a pipe or a device."""
    os.mkfifo(tmp_path / "pipe")
    done = sqa("variants", "--json", str(tmp_path / "pipe"), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "is no regular file" in done.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_json_needs_a_folder_that_can_be_written_to(tmp_path: Path) -> None:
    code = (  # root may write anywhere
        "import os, sys\n"
        "os.access = lambda path, mode: False\n"
        "sys.argv = ['sqa', 'variants', '--json', 'x.json']\n"
        "from sqa.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "sqa: --json x.json is in a folder that you may not write to; name a file\n"
    assert not done.stdout
