"""Run by the web UI at its start: gives lorakit an environment of its own, once. Nothing of the host's is changed.

LORAKIT_PYTHON names the Python of a lorakit that is installed already.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lorakit_child


def main() -> None:
    """Make the environment, or say how."""
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
    print(f"lorakit: installing it into {place}; this fetches about 3 GB, once", flush=True)
    try:
        subprocess.run([*python, "-m", "venv", str(place)], check=True, stdout=subprocess.DEVNULL)
        own = str(place / lorakit_child.SCRIPTS)
        for words in lorakit_child.install_steps():
            subprocess.run([own, "-m", "pip", "install", "-q", *words], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"lorakit: {error}\n{how}")


if __name__ == "__main__":
    main()
