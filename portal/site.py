"""The running product of a demo: migrated database, local Stripe, web, four workers and beat, each a process of its own."""

import json
import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from portal.environment import Environment
from portal.processes import Supervisor, beat_argv, free_port, web_argv, worker_argv

ROOT = Path(__file__).resolve().parent.parent
WEB_PORT = 8000
WORKERS = ("ingest", "attribution", "default", "payments")
ENDPOINTS = {"platform": "STRIPE_WEBHOOK_SECRET", "connect": "STRIPE_CONNECT_WEBHOOK_SECRET"}


@dataclass(frozen=True)
class Site:
    """Where it answers, and what its processes were given."""

    url: str
    stripe_url: str
    stripe_key: str
    environment: Environment
    supervisor: Supervisor

    def advance_stripe_clock(self, seconds: int) -> None:
        self._stripe("POST", "/_control/clock", json={"advance_seconds": seconds})

    def _stripe(self, method: str, path: str, **arguments: Any) -> Any:
        return _stripe(self.stripe_url, self.stripe_key, method, path, **arguments)


def start_site(
    supervisor: Supervisor, environment: Environment, var: Path, *, port: int | None = None, payout_days: int = 1
) -> Site:
    """Migrate, then start every process and wait until each is ready; what an earlier run left in `var` is kept.

    Raises:
        ProcessFailed: a process ended or was not ready in time; the message has the end of its log.
        CalledProcessError: a migration failed.
    """
    known = _recall(var)
    migrate(environment)

    stripe_port = _port(known.get("stripe_port"))
    stripe_url = f"http://127.0.0.1:{stripe_port}"
    key = known.get("stripe_key") or f"sk_test_{secrets.token_hex(16)}"
    supervisor.start(
        "local-stripe",
        [sys.executable, "-m", "payouts.local_stripe", "--validate", *_options(var, stripe_port, payout_days)],
        env={**os.environ, "LOCAL_STRIPE_SECRET_KEY": key},
        ready=f"{stripe_url}/",
    )

    web_port = _port(port or known.get("web_port") or WEB_PORT)
    url = f"http://127.0.0.1:{web_port}"
    hooks = _webhook_endpoints(stripe_url, key, url, known.get("hooks", {}))
    _remember(var, {"stripe_port": stripe_port, "stripe_key": key, "web_port": web_port, "hooks": hooks})

    stripe = {"STRIPE_API_KEY": key, "STRIPE_API_BASE": stripe_url}
    stripe |= {variable: hooks[name]["secret"] for name, variable in ENDPOINTS.items()}
    address = {"BASE_URL": url}
    environment = replace(
        environment, app=environment.app | address, worker=environment.worker | address, stripe=stripe
    )
    supervisor.start("web", web_argv(port=web_port), env=environment.of("web"), ready=f"{url}/healthz", wait=False)
    for queue in WORKERS:
        n_at_once = max(1, min(4, os.cpu_count() or 1)) if queue == "attribution" else 1  # one thread each
        supervisor.start(
            queue, worker_argv(queue, n_at_once=n_at_once), env=environment.of(queue), ready="ready.", wait=False
        )
    supervisor.start("beat", beat_argv(), env=environment.of("beat"), ready="beat: Starting", wait=False)
    supervisor.wait_until_ready(deadline_seconds=120)
    return Site(url=url, stripe_url=stripe_url, stripe_key=key, environment=environment, supervisor=supervisor)


def migrate(environment: Environment) -> None:
    """As the owner's role; the other two may not."""
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "--verbosity", "0"],
        cwd=ROOT,
        env={**os.environ, **environment.owner, "RESIDUAL_PROCESS": "migrate"},
        check=True,
        stdin=subprocess.DEVNULL,
    )


def _webhook_endpoints(stripe_url: str, key: str, url: str, known: dict[str, Any]) -> dict[str, Any]:
    """One endpoint for the platform's events and one for its payees', each with its secret, told once at its creation."""
    hooks = dict(known)
    for name in ENDPOINTS:
        address = f"{url}/webhooks/stripe/{name}/"
        if name in hooks:
            _stripe(stripe_url, key, "POST", f"/v1/webhook_endpoints/{hooks[name]['id']}", data={"url": address})
            continue
        made = _stripe(
            stripe_url,
            key,
            "POST",
            "/v1/webhook_endpoints",
            data={"url": address, "enabled_events[0]": "*", "connect": str(name == "connect").lower()},
        )
        hooks[name] = {"id": made["id"], "secret": made["secret"]}
    return hooks


def _stripe(stripe_url: str, key: str, method: str, path: str, **arguments: Any) -> Any:
    answer = httpx.request(method, f"{stripe_url}{path}", headers={"Authorization": f"Bearer {key}"}, **arguments)
    answer.raise_for_status()
    return answer.json()


def _options(var: Path, port: int, payout_days: int) -> list[str]:
    return ["--data", str(var / "stripe"), "--port", str(port), "--payout-days", str(payout_days)]


def _port(wanted: int | None) -> int:
    """The wanted port where it is free, or any."""
    if wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                return free_port()
            return wanted
    return free_port()


def _recall(var: Path) -> dict[str, Any]:
    path = var / "site.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _remember(var: Path, facts: dict[str, Any]) -> None:
    """Written whole or not at all, readable by its owner only: it holds the play money's keys."""
    partial = var / "site.json.partial"
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(facts))
    partial.replace(var / "site.json")
