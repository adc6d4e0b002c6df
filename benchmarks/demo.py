"""How long the demo takes, step by step, on an empty folder: `./run bench demo`.

It starts everything anew in a temporary folder, does the whole job and prints the demo's own table of seconds; exits with the
demo's status, which is not 0 when a check fails or the whole takes more than 300 s.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from portal import embedded

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="residual-demo-") as folder:
        command = [sys.executable, "-m", "portal.demo", "--no-serve"]
        environment = os.environ | {"RESIDUAL_VAR": folder}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        finally:
            embedded.remove(Path(folder))
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    else:
        print(done.stdout[done.stdout.index("Seconds per step") :])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
