"""``halfbyte demo``: the offline quick start."""

import os
from pathlib import Path

from halfbyte.commands.parser import Parser
from halfbyte.errors import UserError


def main(arguments: list[str]) -> int:
    """Train base, SFT and DPO into a directory and return the exit code; raises UserError under a launcher."""
    parser = Parser("demo")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("halfbyte-demo"),
        metavar="DIR",
        help="where base/, sft/ and dpo/ are written (default: ./halfbyte-demo)",
    )
    options = parser.parse(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("halfbyte demo starts its own processes; run it without `accelerate launch`")
    from halfbyte import demo  # imports rich and safetensors

    return demo.run(options.output_dir)
