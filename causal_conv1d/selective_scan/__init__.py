"""The selective scan of Mamba: operators, public functions, and mamba_ssm's own interface.

``selective_scan_cuda`` and its relatives (``_core``, ``_oflex``, ``_ndstate``, ``_nrow``), which
mamba_ssm and VMamba's descendants import, are thin modules over :func:`selective_scan_fwd` and
:func:`selective_scan_bwd`. The formulas stand in ``csrc/selective_scan.h``. The kernels take any
real A of up to 256 states; a complex one goes through ``plain.py``, where B and C are complex too
(in time, as pairs of real numbers along their last axis) and the sum over n is twice its real part.
"""

from .interface import selective_scan_bwd, selective_scan_fwd

__all__ = ["selective_scan_bwd", "selective_scan_fwd"]
