"""The machine's speed at its best, in a process of its own: python -m sides.product TASK_FOLDER BATCH_SIZE STEPS WARMUP

A product of two square fp32 matrices takes the place of a step, in turns with the others: what no training step can exceed.
"""

from __future__ import annotations

import sys

import torch

from sides.meter import Meter

WIDTH, PRODUCTS = 1536, 12
FLOPS = 2 * WIDTH**3 * PRODUCTS
"""Of one turn."""


def main(num_steps: int, warmup_steps: int) -> None:
    """Multiply and print the figures."""
    torch.set_num_threads(2)
    a_MM, b_MM = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
    out_MM = torch.empty_like(a_MM)
    meter = Meter(warmup_steps, None)
    meter.start()
    for _ in range(num_steps):
        for _ in range(PRODUCTS):
            torch.mm(a_MM, b_MM, out=out_MM)
        meter.step_done(0.0)
    meter.print_result()


if __name__ == "__main__":
    main(int(sys.argv[3]), int(sys.argv[4]))
