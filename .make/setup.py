"""Find a Python that effnb supports, and let it do the rest (`environment.py`, beside this file).

    python .make/setup.py lab [options of JupyterLab]      # install if needed, open your copies
    python .make/setup.py author [options of JupyterLab]   # the same, on the chapters themselves
    python .make/setup.py reset CHAPTER ...                # begin copies again, keep what you had
    python .make/setup.py install lab|test|data            # only install what that needs
    python .make/setup.py browser                          # find or install one for the tests
    python .make/setup.py preflight                        # is this laptop ready?
    python .make/setup.py wheels FOLDER                    # packages for a room without a network

Whatever Python comes first on a machine may run this file, so it is written in the Python of long
ago: no f-strings, no annotations, the standard library only.
"""

import os
import subprocess
import sys

OLDEST = (3, 11)
NEWEST = (3, 13)
HERE = os.path.dirname(os.path.abspath(__file__))


def version_of(command):
    """The (major, minor) version of a Python by its command, or None when it does not run."""
    try:
        with open(os.devnull, "w") as nowhere:
            program = "import sys; print('%d.%d' % sys.version_info[:2])"
            said = subprocess.check_output(command + ["-c", program], stderr=nowhere)
        major, minor = said.decode("ascii").strip().split(".")
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def supported(version):
    """Whether effnb runs on this version."""
    return version is not None and OLDEST <= tuple(version[:2]) <= NEWEST


def another_python():
    """The command of a supported Python elsewhere on this machine, or None."""
    minors = range(NEWEST[1], OLDEST[1] - 1, -1)
    candidates = [["python3.%d" % minor] for minor in minors]
    if os.name == "nt":
        candidates = [["py", "-3.%d" % minor] for minor in minors]
    for command in candidates:
        if supported(version_of(command)):
            return command
    return None


def hand_over(command):
    """Let a command take this process's place; where that is impossible, wait for it."""
    if os.name != "nt":
        os.execvp(command[0], command)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # meant for JupyterLab, which asks before it closes
            continue


def main():
    """Run `environment.py` with a supported Python, or say in one sentence what is missing."""
    command = [sys.executable]
    if not supported(sys.version_info[:2]):
        command = another_python()
    if command is None:
        sys.stderr.write(
            "This is Python %d.%d, and effnb needs Python %d.%d to %d.%d: install one of them "
            "(with your package manager, conda or the installer of the Python project) and name "
            "it, as in `make lab PYTHON=python%d.%d`.\n"
            % (tuple(sys.version_info[:2]) + OLDEST + NEWEST + NEWEST)
        )
        return 1
    return hand_over(command + [os.path.join(HERE, "environment.py")] + sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
