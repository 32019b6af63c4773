r"""Predict rows with the best checkpoint of a run: ``raysgd predict`` as a script, for ``ray submit`` and
``ray job submit``.

    ray job submit --working-dir . -- python jobs/predict.py /shared/runs/flights --data /shared/new \
        --output /shared/predicted.parquet --num-workers 16
    ray submit cluster.yaml jobs/predict.py -- /shared/runs/flights --data /shared/new \
        --output /shared/predicted.parquet --num-workers 16 --address auto

``ray submit`` uploads this one file, so it uses nothing but the installed package. Arguments and exit codes are those
of ``raysgd predict``; ``raysgd quote`` writes arguments with spaces, quotes or ``$`` so that they arrive unchanged.
Name data and outputs by absolute paths or URIs that every node sees.
"""

from __future__ import annotations

import sys

from raysgd.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
