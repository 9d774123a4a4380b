"""The guarded worker on CPUs, in a module of its own: vLLM's wants to be imported first."""

from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import GuardedMixin


class GuardedCPUWorker(GuardedMixin, CPUWorker):
    """A worker on CPUs."""
