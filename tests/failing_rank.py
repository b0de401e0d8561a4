"""train_bias.py with a rank that fails: FAIL is 'RANK raise' or 'RANK kill'.

It fails at the third step. The other ranks then sleep, as they would in a collective of NCCL,
which unlike gloo does not notice that a process is gone.
"""

import os
import signal
import time

import train_bias
from lmc.training.bias import CorrectorTraining

rank, how = os.environ["FAIL"].split()
step = CorrectorTraining.training_step


def failing(self, batch, batch_idx):
    if batch_idx == 2:
        if self.global_rank != int(rank):
            time.sleep(600)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("broken on purpose")
    return step(self, batch, batch_idx)


CorrectorTraining.training_step = failing
if __name__ == "__main__":
    train_bias.main()
