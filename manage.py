#!/usr/bin/env python
"""Django's command line; in demo mode it brings the embedded servers along."""

import os
import sys
from contextlib import ExitStack

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    with ExitStack() as stack:
        if os.environ.get("RESIDUAL_MODE") == "demo" and "DATABASE_URL" not in os.environ:
            from portal.environment import demo_environment

            os.environ.update(stack.enter_context(demo_environment()).owner)
        execute_from_command_line(sys.argv)
