#!/usr/bin/env python
"""Time the project's kernels against PyTorch's formulations and other packages, in one run.

    python tools/bench_kernels.py --json output/kernels.json --plot output/kernels.png
    python tools/bench_kernels.py --cases encoder_forward lsh_total --threads 1
    python tools/bench_kernels.py --markdown

A row divides the time of the fastest reference by ours. Contenders take turns, and each counts with
its fastest turn, because what other processes do can only slow a turn down; the spread is the
distance of the median turn from it. On a CPU, "CPU ratio" compares computing times of all threads,
which hardly depend on other processes. The results of each contender are compared with float64 in
the same run: the maximum error is relative to the largest number of a tensor.

The floor is the time that a copy would need for the compulsory memory traffic of a case, each input
read once and each output written once, at the bandwidth of a large copy measured in the same run.

Leaves with status 1 if a result of the project is wrong, 2 after an error in the arguments.
"""

from __future__ import annotations

import os

# Read when torch is loaded: threads that spin while they wait spoil the times of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kernel_benchmark import report
from kernel_benchmark.attention import PRECISIONS, plan_attention
from kernel_benchmark.case import Case, Contender, Plan, relative_error
from kernel_benchmark.clustering import plan_clustering
from kernel_benchmark.command import check_counts, check_device, check_writable
from kernel_benchmark.dat import plan_dat
from kernel_benchmark.report import Measurement, Row
from kernel_benchmark.timing import (
    SHORTEST_TURN_SECONDS,
    Clock,
    clock_for,
    copy_bandwidth,
    interleave,
)
from tqdm import tqdm

from efficient_detr.engine.commands import report_user_error
from efficient_detr.errors import UserError

WRONG_RESULT_STATUS = 1
INTERRUPTED_STATUS = 130


@dataclass
class Findings:
    """What has been measured so far.

    Attributes:
        rows: the comparisons.
        cases: measurements by title of the case and name of the contender.
        wrong: sentences about results of the project that differ from float64.
    """

    rows: list[Row] = field(default_factory=list)
    cases: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, 1 after a wrong result, 2 after an error that the user can put right,
        130 after Ctrl-C.
    """
    arguments = parse(argv)
    try:
        findings = benchmark(arguments)
    except UserError as error:
        return report_user_error(error)
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; --json holds the cases that were finished.\n")
        return INTERRUPTED_STATUS
    for sentence in findings.wrong:
        sys.stderr.write(f"Wrong: {sentence}\n")
    return WRONG_RESULT_STATUS if findings.wrong else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="rows to measure; default: all")
    parser.add_argument(
        "--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS)
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: as torch chooses")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns a contender")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the command out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios there")
    parser.add_argument(
        "--markdown", action="store_true", help="print the first table only, for documents"
    )
    arguments = parser.parse_args(argv)
    arguments.turn_seconds = 0.001 if arguments.small else SHORTEST_TURN_SECONDS
    return arguments


def benchmark(arguments: argparse.Namespace) -> Findings:
    """Measure and show what the command line asks for."""
    device = torch.device(arguments.device)
    check(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plans = select(
        [
            *plan_attention(device, arguments.precision, small=arguments.small),
            *plan_clustering(device, small=arguments.small),
            *plan_dat(device, small=arguments.small),
        ],
        arguments.cases,
    )
    clock, findings = clock_for(device), Findings()
    bandwidth = copy_bandwidth(device, clock, arguments.rounds, 4 if arguments.small else 256)
    machine = report.describe_machine(device)
    with tqdm(total=len(plans) * arguments.rounds, unit="round", smoothing=0) as bar:
        for done, plan in enumerate(plans):
            bar.set_description(plan.title)
            measure(plan, clock, arguments, bandwidth, findings, bar)
            bar.update((done + 1) * arguments.rounds - bar.n)
            if arguments.json:  # after each case, so that an interruption costs little
                found = report.as_json(findings.rows, findings.cases, machine, bandwidth)
                report.save_json(found, arguments.json)
    show(findings, arguments, report.machine_line(machine, bandwidth))
    return findings


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work."""
    check_device(arguments.device)
    check_counts(arguments, ("rounds", "threads"))
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None:
            check_writable(path, option)
    if arguments.plot and arguments.plot.suffix != ".png":
        raise UserError(f"--plot draws PNG files, so the name must end in .png: {arguments.plot}")


def select(plans: Iterable[Plan], names: Sequence[str] | None) -> list[Plan]:
    """Keep the plans that make the named rows."""
    plans = list(plans)
    if names is None:
        return plans
    rows = [comparison.name for plan in plans for comparison in plan.comparisons]
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise UserError(f"--cases knows no {', '.join(unknown)}; it can be {', '.join(rows)}.")
    return [plan for plan in plans if {c.name for c in plan.comparisons} & set(names)]


def measure(
    plan: Plan,
    clock: Clock,
    arguments: argparse.Namespace,
    bandwidth: float,
    findings: Findings,
    bar: tqdm,
) -> None:
    """Check and time the contenders of one case, and add them to the findings."""
    case = plan.build()
    errors, failures = check_results(case)
    calls = {name: case.contenders[name].run for name in errors}
    turn_seconds = arguments.turn_seconds
    timings = interleave(
        calls, clock, arguments.rounds, turn_seconds=turn_seconds, on_round=bar.update
    )
    measurements = {}
    for name, timing in timings.items():
        error, problem = errors[name], ""
        if error is not None and error > case.tolerance:
            problem = f"differs from float64 by more than {case.tolerance:.0e}"
            if case.contenders[name].ours:
                findings.wrong.append(f"{plan.title}: {name} {problem}, by {error:.1e}.")
        measurements[name] = Measurement(timing, error, problem)
    for name, why in (failures | case.missing).items():
        measurements[name] = Measurement(None, None, why)
    findings.cases[plan.title] = measurements
    findings.rows += [
        report.make_row(comparison, measurements, case.compulsory_bytes, bandwidth)
        for comparison in plan.comparisons
    ]


def check_results(case: Case) -> tuple[dict[str, float | None], dict[str, str]]:
    """Warm the contenders up and compare their results with float64.

    Returns:
        Errors by contender, None for those without a result to compare; for contenders of other
        packages that fail, the reason instead.
    """
    exact = case.exact()
    errors: dict[str, float | None] = {}
    failures = {}
    for name, contender in case.contenders.items():
        try:
            errors[name] = _error(contender, exact)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if contender.ours:
                raise
            failures[name] = f"fails: {str(error).strip().partition(chr(10))[0]}"
    return errors, failures


def _error(contender: Contender, exact: list[torch.Tensor]) -> float | None:
    if contender.result is None:
        contender.run()
        return None
    return relative_error(contender.result(), exact)


def show(findings: Findings, arguments: argparse.Namespace, machine: str) -> None:
    """Print the tables and draw the picture."""
    markdown = arguments.markdown
    print(machine + "\n")
    print(report.summary_table(findings.rows, markdown=markdown))
    if not markdown:
        print("\n" + report.contender_table(findings.cases))
    if arguments.plot:
        report.save_plot(findings.rows, machine, arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
