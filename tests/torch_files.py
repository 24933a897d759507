"""Files of ``torch.save``, which are refused with a torch that can run code in them."""

from __future__ import annotations

import pytest
import torch

are_read = pytest.mark.skipif(torch.__version__ < (2, 6), reason="files of torch.save are refused before torch 2.6")
