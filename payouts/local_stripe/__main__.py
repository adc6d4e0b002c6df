"""python -m payouts.local_stripe --data DIR --port N --secret-key sk_test_…

gunicorn with one worker process: the state is one file with one writer. Two signals of life besides HTTP: `DIR/address` holds
the base URL once the socket listens, and with `--with-parent` the server ends when its standard input does.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication

from payouts.local_stripe.app import LocalStripe

THREADS = 8


class Server(BaseApplication):
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._app: LocalStripe | None = None
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "bind": f"{self._arguments.host}:{self._arguments.port}",
            "workers": 1,
            "worker_class": "gthread",
            "threads": THREADS,
            # Clients hold connections open; closing one just as it is used would look like a time-out after success.
            "keepalive": 75,
            "graceful_timeout": 1,
            "loglevel": "warning",
            "proc_name": "local-stripe",
            "control_socket_disable": True,
            "when_ready": self._announce,
            "post_worker_init": self._begin,
            "worker_exit": self._end,
        }
        for name, value in settings.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> LocalStripe:
        self._app = LocalStripe(
            data=self._arguments.data,
            secret_key=self._arguments.secret_key,
            validate=self._arguments.validate,
            payout_days=self._arguments.payout_days,
        )
        return self._app

    def _announce(self, arbiter: Any) -> None:
        host, port = arbiter.LISTENERS[0].sock.getsockname()[:2]
        partial = self._arguments.data / "address.partial"
        partial.write_text(f"http://{host}:{port}", encoding="utf-8")
        partial.replace(self._arguments.data / "address")

    def _begin(self, worker: Any) -> None:
        assert self._app is not None
        self._app.start()
        if self._arguments.with_parent:
            threading.Thread(target=_end_with_parent, args=(worker.ppid,), daemon=True).start()

    def _end(self, arbiter: Any, worker: Any) -> None:
        if self._app is not None:
            self._app.stop()


def _end_with_parent(master: int) -> None:
    """Block until standard input closes, which it does however the parent ends, and then end the server."""
    while os.read(0, 4096):
        pass
    os.kill(master, signal.SIGTERM)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m payouts.local_stripe", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of its state")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one; see DIR/address")
    parser.add_argument(
        "--secret-key",
        default=os.environ.get("LOCAL_STRIPE_SECRET_KEY"),
        help="sk_test_…; or the environment's LOCAL_STRIPE_SECRET_KEY, which no process list shows",
    )
    parser.add_argument("--validate", action="store_true", help="hold every answer and event against Stripe's document")
    parser.add_argument(
        "--payout-days", type=int, default=1, help="days from a payee's balance to their bank; 0: at once"
    )
    parser.add_argument("--with-parent", action="store_true", help="end when standard input closes")
    arguments = parser.parse_args(argv)
    if not arguments.secret_key or not arguments.secret_key.startswith("sk_test_"):
        parser.error("--secret-key must begin with sk_test_: the local Stripe is play money only")
    if arguments.payout_days < 0:
        parser.error("--payout-days must be 0 or more")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    arguments.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    Server(arguments).run()


if __name__ == "__main__":
    main(sys.argv[1:])
