#!/usr/bin/env python3
"""Print the commands in README and docs code blocks that follow `<!-- runnable -->`, one per line.

python tools/runnable.py            # unchanged
python tools/runnable.py --small    # scaled down: one epoch, a few samples
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- runnable -->\s*```bash\n(.*?)```", re.DOTALL)
SMALL = {  # pattern of the program: flags to add
    r"samon-train|\btrain\.py": "--epochs 1 --train-num-samples 200 --val-num-samples 100",
    r"samon-validate|\bvalidate\.py": "--num-samples 50",
    r"samon-sweep|sweep\.py": "--epochs 1 --train-num-samples 200 --val-num-samples 100",
}


def commands(text: str) -> list[str]:
    """Commands of the marked blocks, with continued lines joined and without comments and empty lines."""
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in lines if (command := re.sub(r"\s+#.*$|^#.*$", "", line).strip())]


def small(command: str) -> str:
    """The command with the flags of SMALL that apply, so that it ends in seconds."""
    for program, flags in SMALL.items():
        if re.search(program, command):
            sweep = "sweep" in program
            return f"{command} {'' if not sweep or ' -- ' in command else '-- '}{flags}"
    return command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="scaled down to a few seconds each")
    args = parser.parse_args()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for command in commands(page.read_text()):
            print(small(command) if args.small else command)


if __name__ == "__main__":
    main()
