"""``python -m tests.checkpoint.cold ARGUMENTS``: halfbyte without the backwards that settle DDP's buckets."""

from halfbyte.cli import main
from halfbyte.trainer import exact_resume

if __name__ == "__main__":
    exact_resume.ExactResume._lay_out_buckets = lambda trainer: None
    raise SystemExit(main())
