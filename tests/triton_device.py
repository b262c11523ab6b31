"""Where Triton kernels are tested: on a GPU if there is one, in Triton's interpreter if not."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
DOT_DTYPES = (torch.float32, torch.float16, *(() if INTERPRETED else (torch.bfloat16,)))
"""For kernels that multiply: an interpreted product of bfloat16 is `triton_interpreter`'s own."""
