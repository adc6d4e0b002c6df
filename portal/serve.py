"""`./run serve`: web, workers and beat on what is there, until Ctrl-C."""

import sys

from portal.environment import demo_environment, var_dir
from portal.processes import Supervisor
from portal.site import start_site


def main() -> int:
    with demo_environment() as environment, Supervisor(log_dir=var_dir() / "log") as supervisor:
        site = start_site(supervisor, environment, var_dir())
        print(f"Residual is at {site.url} and its local Stripe at {site.stripe_url}; Ctrl-C ends it.", flush=True)  # noqa: T201
        supervisor.run_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
