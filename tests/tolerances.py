"""How far a result may be from the reference in float64: relative errors in the 2-norm, by type.

OUT: results of a bounded number of operations an element (out, dx, dinitial_states).
  float32   5e-7   the W + 1 roundings of 6e-8 each, and those of SiLU, mostly cancel in the 2-norm
  float16   3e-4   one rounding to 11 bits: at most 4.9e-4 an element, 2.1e-4 in the 2-norm
  bfloat16  2e-3   one rounding to 8 bits: at most 3.9e-3 an element, 1.7e-3 in the 2-norm
  float64   1e-12  far below any of the above, so that no part of the chain can be float32
PARAM: dweight and dbias as the raw operator writes them, in float32 (float64 for float64), before
any rounding to the type of a parameter; the key is the type of x.
  float32   2e-6   sums over batch and time in float32
  16 bits   1e-5   the same, where SiLU may be the fast one of the 16-bit types
"""

import torch

OUT = {torch.float32: 5e-7, torch.float16: 3e-4, torch.bfloat16: 2e-3, torch.float64: 1e-12}
PARAM = {torch.float32: 2e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-12}

# Below this number of elements rounding errors no longer average out, and one unit in the last
# place of the largest element is always allowed.
FEW = 256

# Of the selective scan, where hundreds of roundings follow one another in a state: out, du and what
# else has time, and last states; and the gradients that are sums over batch and time.
SCAN = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float64: 1e-12}
SCAN_PARAM = {
    torch.float32: 5e-6,
    torch.float16: 3e-4,
    torch.bfloat16: 2.5e-3,
    torch.float64: 1e-12,
}
