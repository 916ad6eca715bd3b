"""Kernels that explain a missing name from their first cell on.

`make lab` starts JupyterLab with `.make/jupyter`, which names this class. A chapter's first cell
prepares the same, but a learner may run another cell before it.
"""

from __future__ import annotations

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

PYTHON = "python3"
"""The kernel of all chapters."""
EXTENSION = "--IPKernelApp.extra_extensions=effnb.lab.order"


class ExplainingKernels(KernelSpecManager):
    """Jupyter's kernels; Python's own loads `effnb.lab.order` before the first cell."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """How a kernel is started.

        Args:
            kernel_name: Name of the kernel.

        Raises:
            NoSuchKernel: When there is none of that name.
        """
        spec = super().get_kernel_spec(kernel_name)
        if kernel_name == PYTHON and EXTENSION not in spec.argv:
            spec.argv = [*spec.argv, EXTENSION]
        return spec
