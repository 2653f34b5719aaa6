"""What is a loader worker's process? In a module of its own: a worker imports it, and nothing that needs an NPU."""

import os
import sys

from torch.utils.data import Dataset


class Probe(Dataset):
    """Samples: (the id of the process, whether it has torch_npu)."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getpid(), "torch_npu" in sys.modules
