"""Train what a TOML file describes: ``raysgd train`` as a script, for ``ray submit`` and ``ray job submit``.

    ray job submit --working-dir . -- python jobs/train.py jobs/RUN.toml --storage-path /shared/runs
    ray submit cluster.yaml jobs/train.py -- raysgd/jobs/RUN.toml --address auto --storage-path s3://bucket/runs

A job begins in the working directory; ``ray submit`` on the head, where the cluster files copy this directory to
``~/raysgd``. It uploads this one file, so this uses nothing but the installed package. Arguments and exit codes are
those of ``raysgd train``; ``raysgd quote`` writes arguments with spaces, quotes or ``$`` so that they arrive unchanged:

    ray submit cluster.yaml jobs/train.py -- $(raysgd quote raysgd/jobs/RUN.toml --set 'data.label="arr delay"')

Name data and storage by absolute paths or URIs that every node can read: ``ray job submit``
uploads the working directory without what git ignores, and it goes with the job.
"""

from __future__ import annotations

import sys

from raysgd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
