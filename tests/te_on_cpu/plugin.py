"""pytest -p tests.te_on_cpu.plugin: the tests of this process run over Transformer-Engine's Python on a CPU."""

from tests.te_on_cpu import install

install.install()
