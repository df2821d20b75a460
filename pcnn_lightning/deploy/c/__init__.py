"""Networks in C: files for any processor with a C compiler, and a fast runtime where there is one."""

from pcnn_lightning.deploy.c.compiler import CompiledNetwork as CompiledNetwork
from pcnn_lightning.deploy.c.compiler import compile_c as compile_c
from pcnn_lightning.deploy.c.source import save_c as save_c
