"""Run the benchmarks: `python -m benchmarks`; see `benchmarks/README.md`."""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

import torch

from benchmarks import common

RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(common.SUITES))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--peak-of", nargs=3, metavar=("SUITE", "CASE", "NAME"), help="internal")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        common.print_peak(*options.peak_of, options.quick)
        return
    if unknown := [suite for suite in options.suites if suite not in common.SUITES]:
        parser.error(f"expected suites of {', '.join(common.SUITES)}, got {', '.join(unknown)}")
    suites = options.suites or [s for s in common.SUITES if s not in common.ASKED_FOR]
    machine = common.machine(options.threads)
    content = {"quick": options.quick, "machine": machine, "cases": [], "results": []}
    print(json.dumps(machine, indent=1))
    for case in common.cases(suites, options.quick):
        print(common.head(case), flush=True)
        rows = common.run(case, options.quick, options.threads)
        print("\n".join(map(common.line, rows)), flush=True)
        shares = case.shares() if case.shares else {}
        for name, share in shares.items():
            print(f"  {share:.0%} {name}")
        content["results"] += rows
        facts = {"suite": case.suite, "case": case.name, "agreement": case.agreement}
        content["cases"].append(facts | {"settings": case.settings, "shares": shares})
    content = common.beside_others(content, options.json)
    options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
