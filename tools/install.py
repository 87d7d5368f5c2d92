"""Make a virtual environment and install this checkout into it, with the standard library alone.

Plain old syntax on purpose: a Python that is too old must still be able to read this file and say so.
"""

import importlib
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
FREE_GB = 4


def problem(version, free_gb):
    """Why an installation cannot succeed here and what repairs it; None if nothing stands against it."""
    found = "%d.%d" % tuple(version[:2])
    if tuple(version[:2]) < OLDEST:
        return "Python %s is too old (%s): install Python 3.11 or newer, or run make PYTHON=/path/to/it." % (
            found,
            sys.executable,
        )
    try:
        importlib.import_module("ensurepip")
        importlib.import_module("venv")
    except ImportError as error:
        return "Python %s cannot make virtual environments (%s). On Debian or Ubuntu: apt install python%s-venv." % (
            found,
            error,
            found,
        )
    if free_gb < FREE_GB:
        return "Only %.1f GB are free in %s and the installation needs %d: free some space there." % (
            free_gb,
            ROOT,
            FREE_GB,
        )
    return None


def make(folder):
    """Make the virtual environment unless it is complete; pip is the last thing that arrives in one."""
    python = os.path.join(folder, "bin", "python")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not os.path.exists(python) or subprocess.call([python, "-m", "pip", "--version"], **quiet) != 0:
        subprocess.check_call([sys.executable, "-m", "venv", folder])
    return python


def install(python, extras, log):
    """Run pip; every few seconds say what it is at, and keep all it says in the file ``log``."""
    command = [python, "-m", "pip", "install", "--no-input", "-c", "constraints.txt", "-e", ".[%s]" % extras]
    pip = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, said = [], time.time()
    with open(log, "w") as file:
        for line in pip.stdout:
            file.write(line)
            lines.append(line)
            if time.time() - said > 5 and line.lstrip().startswith(("Collecting", "Downloading", "Installing")):
                print("  " + line.strip()[:90])
                sys.stdout.flush()
                said = time.time()
    if pip.wait() != 0:
        sys.exit("".join(lines[-15:]) + "make: pip failed; all it said is in %s. Mend that and run make again." % log)


def main(folder, extras):
    """Check, make, install."""
    reason = problem(sys.version_info, shutil.disk_usage(ROOT).free / 1e9 if sys.version_info[0] > 2 else 0)
    if reason:
        sys.exit("make: " + reason)
    start, log = time.time(), os.path.join(folder, "install.log")
    print("Installing replib[%s] into %s (2 GB, more with CUDA; 2 to 6 minutes; log: %s)" % (extras, folder, log))
    sys.stdout.flush()
    install(make(folder), extras, log)
    print("Installed in %d s." % (time.time() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
