"""`./run demo [--no-serve]`: the whole job on real data; then the site, until Ctrl-C."""

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING

import django
import torch

from portal.demo.console import DemoFailed, Steps, console, say, show_table
from portal.environment import demo_environment, var_dir
from portal.processes import ProcessFailed, Supervisor
from portal.site import Site, start_site

if TYPE_CHECKING:
    from portal.demo.job import MainJob

LIMIT_SECONDS = 300
BUDGET = "400"  # trainings' worth of measuring: what two cores do in the time that a newcomer waits
COLUMNS = ["Contributor", "Records", "By count", "Measured, 95 %", "Paid share", "Earned, USD", "Paid, USD"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__)
    parser.add_argument("--no-serve", action="store_true", help="exit when the job is done")
    arguments = parser.parse_args(argv)
    var = var_dir()
    os.environ.setdefault("ATTRIBUTION_BUDGET", BUDGET)
    steps = Steps(n_step=9)
    try:
        with demo_environment(var) as environment, Supervisor(log_dir=var / "log") as supervisor:
            with steps.step("Start PostgreSQL, Redis, web, four workers, beat and the local Stripe"):
                site = start_site(supervisor, environment, var)
                os.environ.update(site.environment.of("web"))
                django.setup()
                torch.set_num_threads(1)  # as the worker: replays are bit-equal on one build and one thread count
                logging.getLogger().setLevel(logging.WARNING)  # the processes' logs are in var/log; here are the steps
                say(f"{len(supervisor.children)} processes; logs in {var.name}/log")
            _do(site, steps)
            if not arguments.no_serve:
                _say_where(site)
                supervisor.run_forever()
    except (DemoFailed, ProcessFailed) as error:
        console.print(f"\n[bold red]The demo failed:[/] {error}", markup=True)
        return 1
    return 0


def _do(site: Site, steps: Steps) -> None:
    """Every step in turn, then the tables and the checks.

    Raises:
        DemoFailed: a step, a check or the time limit.
    """
    from portal.demo.browser import PageRefused
    from portal.demo.job import MainJob

    try:
        with MainJob(site, var_dir()) as job:
            for title, act in (
                ("Upload a Parquet and a CSV file through the web form", job.upload),
                ("List: attest, offer, ODRL", job.list_for_sale),
                ("License by API, pay by Stripe Checkout, download", job.license),
                ("Train and disclose", job.train_and_disclose),
                ("Attribute: replay, measure, publish", job.attribute),
                ("Disclose by meter and by checkpoints", job.disclose_more),
                ("Divide and pay", job.divide_and_pay),
            ):
                with steps.step(title):
                    act()
            with steps.step("Read: pages, statements, checks"):
                _read(job)
    except PageRefused as error:
        raise DemoFailed(str(error)) from error
    show_table("Seconds per step", ["Step", "Seconds"], [[name, f"{took:.1f}"] for name, took in steps.seconds.items()])
    total = steps.total_seconds
    console.print(f"\nThe whole took [bold]{total:.0f} s[/bold]; the limit is {LIMIT_SECONDS} s.")
    if total > LIMIT_SECONDS:
        raise DemoFailed(f"it took {total:.0f} s, over the limit of {LIMIT_SECONDS} s")


def _read(job: "MainJob") -> None:
    from portal.demo.checks import all_checks, table_rows

    job.read_weaker()
    job.read_pages()
    show_table("Rights holders", COLUMNS, table_rows("rights_holder"))
    show_table("Labellers", COLUMNS, table_rows("labeller"))
    console.print()
    failed = []
    for check in all_checks():
        mark = "[green]holds[/]" if check.holds else "[bold red]FAILS[/]"
        console.print(f"    {mark}  {check.claim}\n           [dim]{check.figures}[/dim]")
        failed += [] if check.holds else [check.claim]
    if failed:
        raise DemoFailed(f"{len(failed)} of the checks: {'; '.join(failed)}")


def _say_where(site: Site) -> None:
    from portal.demo import cast

    console.print(
        f"\nResidual is at [bold]{site.url}[/bold], its local Stripe at {site.stripe_url}. Sign in with the password"
    )
    console.print(f'"{cast.PASSWORD}" as {cast.CURATOR} (uploads), {cast.TRAINER} (buys),')
    console.print(
        f"{cast.email_of(cast.HOLDERS[0])} (rights holder) or {cast.email_of(cast.LABELLERS[0])} (labeller). Ctrl-C ends it."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
