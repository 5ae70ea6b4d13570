"""Mixed-modal transformer layers on megatron-core's TransformerBlock. Independent of data and training loop."""

from mmscale.runtime import megatron_cpu

# megatron-core binds its JIT decorators while its modules are imported, so the adaptor must be installed before them.
megatron_cpu.install()
