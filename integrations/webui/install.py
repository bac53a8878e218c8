"""Install lorakit into its own virtual environment. The web UI runs this file when it starts.

It installs only once and changes nothing of the host. LORAKIT_PYTHON names the Python of a lorakit that is already
installed.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lorakit_child


def main() -> None:
    """Create the environment, or print how to create it."""
    try:
        lorakit_child.command()
        return
    except lorakit_child.Failed as problem:
        how = str(problem)
    python = lorakit_child.find_python()
    if python is None or "LORAKIT_PYTHON" in how:
        print(how)
        return
    place = lorakit_child.HERE / "venv"
    print(f"lorakit: installing it into {place}; this downloads about 3 GB, only once", flush=True)
    try:
        subprocess.run([*python, "-m", "venv", str(place)], check=True, stdout=subprocess.DEVNULL)
        own = str(place / lorakit_child.SCRIPTS)
        for words in lorakit_child.install_steps():
            subprocess.run([own, "-m", "pip", "install", "-q", *words], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"lorakit: {error}\n{how}")


if __name__ == "__main__":
    main()
