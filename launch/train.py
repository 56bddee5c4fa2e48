#!/usr/bin/env python
"""Start a training run under torchrun, as on a cluster; `megallama train` starts the ranks itself.

torchrun --nproc-per-node 8 launch/train.py +exp=llama2_7b parallel.tp=8 optim.lr=1e-4
python launch/train.py +exp=demo                                  one process
python launch/train.py --multirun +exp=demo optim.lr=1e-3,3e-3    runs one after another, in run_dir/0, ...
python launch/train.py +exp=demo --cfg job                        only show the settings
"""

import sys

from megallama.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
