"""Imported by the server that tests fork processes from: all that the first expansion imports is there afterwards.

Nothing here may run backward, whose threads do not survive a fork.
"""

from __future__ import annotations

import contextlib

import torch

with contextlib.suppress(ImportError):
    import accelerate as accelerate
    import torchvision as torchvision
    from timm import data as data
    from timm import optim as optim
    from timm import scheduler as scheduler
    from timm import utils as utils

from gpd_fx import expand
from tests.distill_data import Net

torch.set_num_threads(1)
expand(Net(), 2.0, (torch.zeros(2, 3, 6, 6),), verify=False)
