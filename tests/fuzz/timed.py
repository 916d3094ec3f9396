"""Runs one fuzzer for a given time or number of cases. Case n depends on its number alone, so a finding is repeated."""

import argparse
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from random import Random


def fuzz(case: Callable[[Random], object], about: str) -> None:
    """`case(random)` draws from `random` what it tries and raises on a finding; the process then ends with code 1."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="stop after so many, whatever the time")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--all", action="store_true", help="go on after a finding")
    parser.add_argument("--sanitize", action="store_true", help="compile our kernel with g++'s address sanitizer")
    given = parser.parse_args()
    if given.sanitize and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _sanitizer())
    begin, number, failed = time.monotonic(), given.seed, 0
    while number - given.seed < given.cases if given.cases else time.monotonic() - begin < 60 * given.minutes:
        try:
            case(Random(number))
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"Case {number} failed. Repeat it: python {sys.argv[0]} --seed {number} --cases 1", file=sys.stderr)
            if not given.all:
                sys.exit(1)
        number += 1
        if (number - given.seed) % 50 == 0:
            print(f"{number - given.seed} cases, {failed} failed", file=sys.stderr, flush=True)
    found = f"{failed} of them failed" if failed else "nothing found"
    print(f"{about}: {number - given.seed} cases in {time.monotonic() - begin:.0f} s, {found}.")
    sys.exit(failed > 0)


def _sanitizer() -> dict[str, str]:
    """The environment in which fused.cpp is compiled and run with it; such a build is one more in the cache."""
    compiler = shutil.which("g++")
    if compiler is None:
        sys.exit("no address sanitizer: there is no g++")
    libraries = [  # the second so that the first finds what throws exceptions, which python itself does not load
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        sys.exit(f"no address sanitizer: {compiler} has no libasan.so")
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # python's own
        # checks as calls, not inline: half the time to compile
        "CXX": f"{compiler} -fsanitize=address -g --param asan-instrumentation-with-call-threshold=0",
    }
