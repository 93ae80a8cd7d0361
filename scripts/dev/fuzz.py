"""The convolution with options, the pool of states or the scan against float64, at random.

    python scripts/dev/fuzz.py --device cuda --seed 1 --cases 20000
    python scripts/dev/fuzz.py --of pool

Each case has a seed of its own, SEED * 1000000 + its number, which a failure names; --first NUMBER
--cases 1 runs that one again. Ends with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests"))

import options_cases  # noqa: E402
import pool_cases  # noqa: E402
import scan_cases  # noqa: E402
import state_update_cases  # noqa: E402
import torch  # noqa: E402

CASES = {
    "options": options_cases,
    "pool": pool_cases,
    "scan": scan_cases,
    "state_update": state_update_cases,
}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--of", choices=CASES, default="options")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after that time")
    args = parser.parse_args(arguments)
    cases = CASES[args.of]
    start, failed, done = time.monotonic(), 0, 0
    for number in range(args.first, args.first + args.cases):
        if time.monotonic() - start > args.seconds:
            break
        rng = random.Random(args.seed * 1_000_000 + number)
        case = cases.random_case(rng, args.device)
        done += 1
        try:
            cases.assert_case(*case)
        except Exception as error:
            failed += 1
            print(f"case {number} of seed {args.seed}: {error}")
            print(f"  {cases.described(*case)}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            if failed >= 20:
                print("more are not looked for")
                break
        if done % 200 == 0:
            print(f"{done} cases, {failed} wrong, {time.monotonic() - start:.0f} s", flush=True)
    print(
        f"{done} cases of seed {args.seed} on {args.device}, torch {torch.__version__}: "
        f"{failed} wrong, {time.monotonic() - start:.0f} s"
    )
    return int(failed > 0 or done < args.cases and args.seconds == float("inf"))


if __name__ == "__main__":
    sys.exit(main())
